"""Exception types. Every error the library raises on purpose is a `ResidSurgeryError`.

Children are also the builtin that a caller would expect to catch, so
`except IndexError` around a site lookup works as well as `except SiteError`.
"""

import re

LONGEST, HEAD, TAIL = 480, 300, 160
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


class ResidSurgeryError(Exception):
    """Base class of every error raised on purpose by this library: one line, of fewer than 500 characters.

    What a caller gave stands in messages (texts, paths, names) and may be of any length; the middle is then left out,
    so that what must hold stays at the beginning and what to do at the end.
    """

    def __init__(self, said: object = "") -> None:
        line = " ".join(str(said).split()).encode("utf-8", "backslashreplace").decode()
        line = CONTROL.sub(lambda one: repr(one[0])[1:-1], line)
        super().__init__(line if len(line) <= LONGEST else f"{line[:HEAD]} ... {line[-TAIL:]}")


class ArgumentError(ResidSurgeryError, ValueError):
    """An argument has the wrong type, range or spelling."""


class SiteError(ResidSurgeryError, IndexError):
    """A site does not exist in the model, or cannot be operated on as asked."""


class PromptError(ResidSurgeryError, ValueError):
    """A prompt, target, competitor or position cannot be used with the tokenizer or model."""


class LoadError(ResidSurgeryError, OSError):
    """A model could not be found or read."""


class UnsupportedModelError(ResidSurgeryError, ValueError):
    """The architecture is not one whose residual stream this library can split."""


class ClosureError(UnsupportedModelError):
    """A sum that must hold does not hold on this model; the model or run is refused."""


class StaleRecordingError(ResidSurgeryError, RuntimeError):
    """The model's weights are not those that the recording was made with."""


class InterventionError(ResidSurgeryError, ValueError):
    """Interventions contradict each other, do not fit the prompt, or did not fire."""


class RunError(ResidSurgeryError, RuntimeError):
    """A run cannot begin, go on or be resumed; what it has finished is kept."""


OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which says nothing about a model. On the CPU torch says so in a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
