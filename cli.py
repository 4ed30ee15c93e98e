"""What a user types and what he is told: flags from dataclasses, one-line errors, the device, files that are whole or absent.

Every script is `cli.run(main)`. A configuration is a dataclass; each field is a flag, and the comment behind the field is its help.
"""
import argparse
import dataclasses
import difflib
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the user can mend: one line saying what was wrong, where, and what to do. Scripts exit with code 2."""


def run(main):
    """Call `main()`; a UserError becomes one line on stderr and exit code 2, Ctrl-C becomes exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def choose(name, choices, what):
    """Return `name` if it is one of `choices`; else a UserError with all of them and the nearest one."""
    choices = list(choices)
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name).lower(), [c.lower() for c in choices], n=1, cutoff=0.5)
    hint = next(f"; did you mean {c}?" for c in choices if c.lower() == near[0]) if near else ""
    raise UserError(f"unknown {what} {name!r}, choose from: {', '.join(choices)}{hint}")


def choose_many(names, choices, what):
    """A comma-separated list of names, each once, or "all", as a list."""
    return list(choices) if names == "all" else list(dict.fromkeys(choose(name.strip(), choices, what) for name in names.split(",")))


def at_least(config, low, *names):
    """UserError if one of these numbers of a configuration is smaller than `low`, or not a number."""
    for name in names:
        if not getattr(config, name) >= low:
            raise UserError(f"--{name} {getattr(config, name)} must be at least {low}")


def writable(folder):
    """UserError if nothing can be written into a folder: to be told before the work, not after. Leaves nothing behind. Under torchrun the first process asks."""
    if this_process()[0]:
        return
    new = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
    with atomic(Path(folder) / ".writable"):
        pass
    (Path(folder) / ".writable").unlink()
    with suppress(OSError):                                  # somebody else writes there by now
        for place in new:
            place.rmdir()


def this_process():
    """(rank, world): which of how many processes this is under torchrun, (0, 1) otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pool(workers):
    """A multiprocessing.Pool of fresh processes with one thread each; Ctrl-C is left to the process that asks them to work."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], [s for a in self._actions for s in a.option_strings], n=1) if unknown else []
        raise UserError(message + (f"; did you mean {near[0]}?" if near else "") + "; --help lists the flags")


def field_comments(config_class):
    """{field: the comment behind it in the source}: the flag's help."""
    sources = [inspect.getsource(part) for part in reversed(config_class.__mro__[:-1])]
    return dict(pair for source in sources for pair in re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, re.M))


def parse(*config_classes, presets=None, description=None, argv=None):
    """One instance of each dataclass from the command line; a tuple, or the instance itself if there is one class.

    presets {name: instance of the last class}: adds --preset (default: the first name), whose numbers replace that class's defaults.
    Raises UserError on an unknown flag or preset, or on a value of the wrong type.
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    preset = None
    if presets:
        parser.add_argument("--preset", default=next(iter(presets)), help="set of defaults: " + ", ".join(presets))
        first = Parser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=next(iter(presets)))
        preset = presets[choose(first.parse_known_args(argv)[0].preset, presets, "preset")]
    for config_class in config_classes:
        comments = field_comments(config_class)
        for field in dataclasses.fields(config_class):
            base = preset if preset is not None and config_class is config_classes[-1] else None
            default = getattr(base, field.name) if base is not None else field.default
            options = {"default": default, "help": comments.get(field.name, " ")}
            if isinstance(default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(default, (int, float, str)):
                options["type"] = type(default)
            else:
                continue                                     # structured fields are no flags
            parser.add_argument(f"--{field.name}", **options)
    values = vars(parser.parse_args(argv))
    made = tuple(c(**{f.name: values[f.name] for f in dataclasses.fields(c) if f.name in values}) for c in config_classes)
    return made if len(made) > 1 else made[0]


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`, renamed to it if the block succeeds and removed if not. Raises UserError if the folder cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror or error}; choose another folder with --out") from None
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)                      # mkstemp makes files private
        temporary.replace(path)
    except (OSError, SafetensorError) as error:              # the latter is a full disk, as safetensors tells it
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was there before is whole") from None
    finally:
        temporary.unlink(missing_ok=True)


def whole_files(folder, pattern):
    """The files of a folder that match, sorted by name, without what `atomic` leaves where its process was killed."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def pick_device(name="auto"):
    """torch.device for "auto", "cpu", "cuda", "cuda:1" or "mps"; prints the choice and why. UserError if it is not there."""
    import torch
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    wanted = best if name == "auto" else name
    kind = choose(wanted.split(":")[0], ["cpu", "cuda", "mps"], "device")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: this machine has no usable {kind}; leave --device out to take {best}")
    print(f"device {wanted} ({'found' if name == 'auto' else 'asked for'})")
    return torch.device(wanted)


def write_json(path, found):
    """`found` as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
