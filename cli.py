"""The command line: flags from dataclasses, one-line errors, the device.

Every script is `cli.run(main)`. A configuration is a dataclass; each field is a flag, and the
comment behind the field is its help.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, where, and what to type."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text, longest=1000):
    """`text` as one readable line: no line breaks, the middle of very long words and texts cut."""
    # a data: URI is one word of kilobytes
    text = re.sub(r"(\S{80})\S{160,}(\S{20})", r"\1...\2", str(text))
    # lone surrogates cannot be printed
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= longest else text[: longest - 60] + " ... " + text[-50:]


def run(main):
    """Call `main()`; a UserError becomes one line and exit code 2, Ctrl-C becomes exit code 130."""
    try:
        main()
    # only what a user can mend: a mistake of ours shall show where it is
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def choose(name, choices, what):
    """`name` if it is one of `choices`; else a UserError that lists them and names the nearest."""
    choices = list(choices)
    if name in choices:
        return name
    hint = nearest(str(name), choices)
    raise UserError(f"unknown {what} {name!r}, choose from: {', '.join(choices)}{hint}")


def nearest(name, choices):
    """The end of an error that says which of the choices may have been meant, if any."""
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[near[0]]}?" if near else ""


def choose_many(names, choices, what):
    """A comma-separated list of names, or "all", as a list in which each stands once."""
    if names == "all":
        return list(choices)
    # each once: what is named twice would be done twice
    return list(dict.fromkeys(choose(name.strip(), choices, what) for name in names.split(",")))


def at_least(config, low, *names):
    """UserError if one of these numbers of a configuration is below `low`, or not a number."""
    for name in names:
        value = getattr(config, name)
        # written so that NaN fails too
        if not low <= value < float("inf"):
            raise UserError(f"--{name} {value} must be at least {low}, and finite")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that name the nearest flag."""

    def error(self, message):
        # argparse knows the flags but names no near one
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        hint = unknown and nearest(unknown[1], self._option_string_actions)
        raise UserError(f"{message}{hint or ''}; --help lists the flags")


def field_comments(config_class):
    """{field: the comment behind it in the source}: the flag's help."""
    comments = {}
    # the base class first, so that a subclass may say it better
    for part in reversed(config_class.__mro__[:-1]):
        comments |= re.findall(r"(?m)^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(part))
    return comments


def parse(config_class, presets=None, description=None, argv=None):
    """A `config_class` from the command line. UserError on unknown flags, presets, wrong types.

    presets {name: config}: adds --preset (default: the first name), whose fields are the defaults.
    """
    defaults = config_class()
    # the preset is read before the other flags, since it sets their defaults
    chosen = Parser(add_help=False, allow_abbrev=False)
    if presets:
        first = next(iter(presets))
        chosen.add_argument("--preset", default=first, help=f"defaults: {', '.join(presets)}")
        name = chosen.parse_known_args(argv)[0].preset
        defaults = presets[choose(name, presets, "preset")]
    parser = Parser(
        description=description,
        parents=[chosen],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        # a shortened flag would change its meaning when another flag comes
        allow_abbrev=False,
    )
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        default = getattr(defaults, field.name)
        options = {"type": type(default)}  # a field's default says what it is
        if isinstance(default, bool):  # type=bool would read "False" as true
            options = {"action": argparse.BooleanOptionalAction}
        help_text = comments.get(field.name, " ")
        parser.add_argument(f"--{field.name}", default=default, help=help_text, **options)
    values = vars(parser.parse_args(argv))
    values.pop("preset", None)
    return config_class(**values)


def pick_device(name="auto"):
    """torch.device for "auto", "cpu", "cuda", "cuda:1" or "mps". Prints the choice and why.

    UserError if this machine has none.
    """
    import torch  # slow to load, and not needed for --help

    # the fastest first
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    best = next((kind for kind, there in usable.items() if there), "cpu")
    device = best if name == "auto" else name
    choose(device.split(":")[0], ["cpu", "cuda", "mps"], "device")
    try:
        torch.empty(0, device=device)  # cuda:7 may not exist, nor cuda
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}; leave it out to take {best}") from None
    print(f"device {device} ({'found' if name == 'auto' else 'asked for'})")
    return torch.device(device)
