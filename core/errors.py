"""The exceptions a user can meet. Each message is one sentence: what, where, what was found, the way out."""

from __future__ import annotations


class MicroscopeError(Exception):
    """Base of every error a user can cause and mend; the app and the command line print it without a traceback."""


class BadConversation(MicroscopeError):
    """A conversation file, or one row of it, cannot be used."""


class PresetError(MicroscopeError):
    """A preset is unknown or says something impossible."""


class ModelError(MicroscopeError):
    """A model cannot be found, loaded or hooked."""


class AdapterError(MicroscopeError):
    """A LoRA adapter cannot be read or does not fit the model."""


class SpanError(MicroscopeError):
    """The response tokens of a conversation could not be found and proven."""


class SaeMismatch(MicroscopeError):
    """An SAE does not belong to this model, hook point or width."""


class CacheError(MicroscopeError):
    """A cache file is missing, incomplete, damaged, locked or not ours."""


class CacheMismatch(CacheError):
    """A cache file was made under another spec: names the field, what was expected and what was found."""

    def __init__(
        self,
        path: object,
        field: str,
        expected: object,
        found: object,
        way_out: str = "extract again into another --cache directory, or remove the file",
    ):
        self.field, self.expected, self.found = field, expected, found
        super().__init__(f"{path}: {field} differs: expected {expected!r}, found {found!r}; {way_out}.")


class DirectionError(MicroscopeError):
    """A direction cannot be read, made or combined."""


class InterventionError(MicroscopeError):
    """An intervention cannot be meant: no such place, feature or scope, or it was made for another model."""


class NotEnoughData(MicroscopeError):
    """The sample cannot support the claim that was asked for."""


class JudgeError(MicroscopeError):
    """A judge cannot be used: it is unknown, does not answer, or refuses."""
