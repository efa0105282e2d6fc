"""Exception types. Every error the library raises on purpose is a `ResidSurgeryError`.

Children are also the builtin that a caller would expect to catch, so
`except IndexError` around a site lookup works as well as `except SiteError`.
"""


class ResidSurgeryError(Exception):
    """Base class of every error raised on purpose by this library."""


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
