"""Every error that trtforge raises on purpose, with the exit code its commands end with.

A message says what is wrong, which value it was, and what to do about it.
"""

from __future__ import annotations


class TrtforgeError(Exception):
    """Base of all errors raised on purpose; anything else is a bug."""

    exit_code = 1


class ConfigError(TrtforgeError):
    """An option, a file or an environment that cannot work as given."""

    exit_code = 2


class ExportError(TrtforgeError):
    """The Hugging Face model cannot become one packed, paged ONNX graph."""

    exit_code = 3


class EngineBuildError(TrtforgeError):
    """The graph cannot become an engine or a repository."""

    exit_code = 4


class PluginError(TrtforgeError):
    """A custom operator was given inputs it does not take."""

    exit_code = 5


class CapacityError(TrtforgeError):
    """There is no room now; the same request can succeed later."""

    exit_code = 6


class RequestError(TrtforgeError):
    """A request that is wrong in itself; sending it again does not help."""

    exit_code = 7


class ServerError(TrtforgeError):
    """A server did not start, stopped, or failed a request that was well formed."""

    exit_code = 8


class DeviceError(ServerError):
    """A GPU or a rank failed: nothing is known about its memory, and no later step of this process can be
    trusted."""


class RequestTimeoutError(TrtforgeError):
    """A request that did not finish within its timeout, whether the server or the client measured it."""

    exit_code = 9
