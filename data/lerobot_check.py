def check(dataset, sheet):
    raise NotImplementedError
