"""The program `overlayfs-py`; mount.fuse3, podman, buildah, Docker and containerd call it like fuse-overlayfs."""

import os
import sys

import mount_helper
from mount_helper.lean import signal
from overlayfs_py import __version__
from overlayfs_py.config import OPTIONS, parse_options
from overlayfs_py.errors import ConfigError, OverlayError

USAGE = "usage: overlayfs-py [-f] [-d] [-o OPTION[,OPTION...]]... [SOURCE] MOUNTPOINT"

SWITCHES = {
    "-o OPTION[,...]": "mount options, listed below",
    "-f, --foreground": "stay in the foreground, log to standard error",
    "-d, --debug": "as -f, and log more",
    "--doctor": "say what this machine offers to a mount",
    "-h, --help": "show this",
    "-V, --version": "show the version",
    "-n, -s, -v, -t TYPE": "taken from mount(8), no effect",
}

_FAILED = 32  # what mount(8) returns for a mount that failed
_MISUSED = 1


class CommandLine:
    """What the words of a command line say."""

    __slots__ = ("debug", "doctor", "foreground", "help", "options", "version", "words")

    def __init__(self) -> None:
        self.options: list[bytes] = []
        self.words: list[bytes] = []
        self.foreground = False
        self.debug = False
        self.doctor = False
        self.help = False
        self.version = False


def main() -> int:
    """Run with the arguments of this process; returns the exit status."""
    # An interrupt ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_standard_descriptors()
    try:
        return run([os.fsencode(argument) for argument in sys.argv[1:]])
    except OverlayError as error:
        _say(str(error))
        return _MISUSED if isinstance(error, ConfigError) else _FAILED


def _say(text: str) -> None:
    line = "".join(char if char.isprintable() else " " for char in text)
    os.write(2, f"overlayfs-py: {line}\n".encode(errors="backslashreplace"))


def _open_standard_descriptors() -> None:
    """A caller may have closed some of 0, 1 and 2; nothing else may get these numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def run(arguments: list[bytes]) -> int:
    """Do what the arguments, without the program's name, ask for; returns the exit status. Raises OverlayError."""
    command = parse_command_line(arguments)
    if command.help:
        print(help_text())
        return 0
    if command.version:
        print(f"overlayfs-py {__version__}")
        return 0
    if command.doctor:
        from overlayfs_py.cli import doctor

        report, works = doctor.examine()
        print(report)
        return 0 if works else 1
    if not 1 <= len(command.words) <= 2:
        raise ConfigError(f"{len(command.words) or 'no'} words where a mountpoint is needed; {USAGE}")
    config = parse_options(
        command.options,
        mountpoint=command.words[-1],
        source=command.words[0] if len(command.words) == 2 else None,
        cwd=os.getcwdb(),
        euid=os.geteuid(),
    )
    from overlayfs_py import mounting

    if command.foreground:
        mounting.serve_in_foreground(config, debug=command.debug)
    else:
        # The helper sees to these itself, and after success the program ends, whatever comes in between.
        signal.pthread_sigmask(signal.SIG_BLOCK, mount_helper.STOP_SIGNALS)
        mounting.mount(config)
        if os.isatty(2):
            # Container engines take a line there for a failure; whoever types a word wrong doesn't read the log.
            for option in config.unknown:
                _say(f"option {option} has no effect here; ignored")
        # Nothing is left to do, and tidying up takes an interpreter longer than the mount took.
        os._exit(0)
    return 0


def parse_command_line(arguments: list[bytes]) -> CommandLine:
    """Sort out switches, `-o` arguments and words, which may come in any order. Raises ConfigError."""
    command = CommandLine()
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        if argument == b"--":
            command.words += reversed(waiting)
            break
        if argument.startswith(b"--"):
            _take_long(command, argument)
        elif argument.startswith(b"-") and argument != b"-":
            _take_short(command, argument, waiting)
        else:
            command.words.append(argument)
    return command


def _take_long(command: CommandLine, argument: bytes) -> None:
    if argument == b"--foreground":
        command.foreground = True
    elif argument == b"--debug":
        command.debug = command.foreground = True
    elif argument == b"--doctor":
        command.doctor = True
    elif argument == b"--help":
        command.help = True
    elif argument == b"--version":
        command.version = True
    else:
        raise ConfigError(f"no switch {os.fsdecode(argument)}; {USAGE}")


def _take_short(command: CommandLine, argument: bytes, waiting: list[bytes]) -> None:
    """One argument may join several letters, and the value of the last one."""
    for position, letter in enumerate(argument.decode("latin-1")[1:], 2):
        if letter in "ot":
            value = argument[position:]
            if not value:
                if not waiting:
                    raise ConfigError(f"switch -{letter} needs a value; {USAGE}")
                value = waiting.pop()
            if letter == "o":
                command.options.append(value)
            return
        if letter == "f":
            command.foreground = True
        elif letter == "d":
            command.debug = command.foreground = True
        elif letter == "h":
            command.help = True
        elif letter == "V":
            command.version = True
        elif letter not in "nsv":
            raise ConfigError(f"no switch -{letter}; {USAGE}")


def help_text() -> str:
    """What --help prints: every switch and every option, in one line or two each."""
    lines = [USAGE, "", "switches:"]
    lines += [f"  {switch:<20} {meaning}" for switch, meaning in SWITCHES.items()]
    lines += ["", "options:"]
    for name, option in OPTIONS.items():
        form = f"  {name}{option.value}"
        lines += [f"{form:<34} {option.help}"] if len(form) <= 34 else [form, f"{'':<34} {option.help}"]
    lines += ["", "Unmount with 'fusermount3 -u MOUNTPOINT' or 'umount MOUNTPOINT'. See overlayfs-py(8)."]
    return "\n".join(lines)
