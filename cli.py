"""The command line: flags from dataclasses, one-line errors, the device.

Every script is `cli.run(main)`. A configuration is a dataclass; each field is a flag, and the
comment after the field is its help text.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import shlex
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can fix: one line that says what, where, and what to type."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text, longest=1000):
    """`text` as one readable line: no line breaks, very long words and texts cut in the middle."""
    # a data: URI is one word of many kilobytes
    text = re.sub(r"(\S{80})\S{160,}(\S{20})", r"\1...\2", str(text))
    # lone surrogates cannot be printed
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= longest else text[: longest - 60] + " ... " + text[-50:]


def run(main):
    """Call `main()`; a UserError becomes one line and exit code 2, Ctrl-C becomes exit code 130."""
    try:
        main()
    # only errors that the user can fix: a bug of ours should show its traceback
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def command_line():
    """The command that started this program, as a user would type it again in the repository."""
    # with -m the first word is the whole path of the module's file
    root = Path(__file__).parent
    path = Path(sys.argv[0])
    program = [path.name]
    if path.is_relative_to(root) and path.parent != root:
        program = ["-m", ".".join(path.relative_to(root).with_suffix("").parts)]
    return shlex.join(["python", *program, *sys.argv[1:]])


def choose(name, choices, what):
    """`name` if it is one of `choices`; else a UserError that lists them and suggests one."""
    choices = list(choices)
    if name in choices:
        return name
    hint = nearest(str(name), choices)
    raise UserError(f"unknown {what} {name!r}, choose from: {', '.join(choices)}{hint}")


def nearest(name, choices):
    """The end of an error message: suggests the choice that was probably meant, if any is close."""
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[near[0]]}?" if near else ""


def choose_many(names, choices, what):
    """A comma-separated list of names, or "all", as a list without duplicates."""
    if names == "all":
        return list(choices)
    # without duplicates: a name given twice would be processed twice
    return list(dict.fromkeys(choose(name.strip(), choices, what) for name in names.split(",")))


def at_least(config, low, *names):
    """UserError if one of these fields of a configuration is below `low` or not finite."""
    for name in names:
        value = getattr(config, name)
        # written so that NaN fails too
        if not low <= value < float("inf"):
            raise UserError(f"--{name} {value} must be at least {low}, and finite")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that name the nearest flag."""

    def error(self, message):
        # argparse knows the flags but does not suggest one
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        hint = unknown and nearest(unknown[1], self._option_string_actions)
        raise UserError(f"{message}{hint or ''}; --help lists the flags")


def field_comments(config_class):
    """{field: the comment after it in the source}, which is the flag's help text."""
    comments = {}
    # base classes first, so that a subclass can override their help
    for part in reversed(config_class.__mro__[:-1]):
        comments |= re.findall(r"(?m)^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(part))
    return comments


def parse(config_class, presets=None, description=None, argv=None):
    """A `config_class` from the command line. UserError on unknown flags or presets, wrong types.

    presets {name: config} adds --preset (default: the first name), which sets the other defaults.
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
        # an abbreviated flag would change its meaning when a new flag is added
        allow_abbrev=False,
    )
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        default = getattr(defaults, field.name)
        options = {"type": type(default)}  # the type of the default is the type of the flag
        if isinstance(default, bool):  # type=bool would read "False" as true
            options = {"action": argparse.BooleanOptionalAction}
        help_text = comments.get(field.name, " ")
        parser.add_argument(f"--{field.name}", default=default, help=help_text, **options)
    values = vars(parser.parse_args(argv))
    values.pop("preset", None)
    return config_class(**values)


def pick_device(name="auto"):
    """torch.device for "auto", "cpu", "cuda", "cuda:1" or "mps". Prints the choice and the reason.

    UserError if this machine does not have it.
    """
    import torch  # slow to load, and not needed for --help

    # fastest first
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    best = next((kind for kind, there in usable.items() if there), "cpu")
    device = best if name == "auto" else name
    choose(device.split(":")[0], ["cpu", "cuda", "mps"], "device")
    try:
        torch.empty(0, device=device)  # fails if this machine has no cuda, or no cuda:7
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}; leave it out to take {best}") from None
    print(f"device {device} ({'found' if name == 'auto' else 'requested'})")
    return torch.device(device)
