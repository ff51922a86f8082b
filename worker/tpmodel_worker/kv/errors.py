"""What goes wrong with a pipe."""


class KvPipeError(Exception):
    """The pipe could not be made, or one of its directions is broken; the message says what it was doing."""


class KvPipeTimeoutError(KvPipeError):
    """Nothing came in time."""


class KvPipeClosedError(KvPipeError):
    """This end or the peer's was closed."""


class KvHeaderError(KvPipeError):
    """A header is not one: nothing was allocated, nothing more was read."""


class KvMismatchError(Exception):
    """Two gangs whose caches don't fit each other; names what differs, and both values. No byte has moved."""
