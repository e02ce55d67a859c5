"""Stop requests: signals that end a program once what was done is saved. Needs no JAX."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORCED_AFTER = 1.0  # seconds; signals closer together are one request, which a terminal and a parent may both send


class Stopped(KeyboardInterrupt):
    """A stop request was obeyed: everything is saved, and the command resumes when it is run again."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_status = 128 + number  # as of a program that the signal has ended


class Request:
    """A stop request, kept from the first signal until it is obeyed.

    Several processes of one job stop together: `agree` says whether one of them was asked to, and now is the moment.
    """

    def __init__(self, agree: Callable[[], bool] | None = None) -> None:
        self.number: int | None = None  # of the signal; None without a request
        self._event = threading.Event()
        self._agree = agree
        self._agreed = False

    def make(self, number: int) -> None:
        """Request a stop, as the signal of this number does."""
        self.number = number
        self._event.set()

    def is_set(self) -> bool:
        """Return True if a stop is requested; all processes of a job must ask equally often."""
        if self._agree is None:
            return self._event.is_set()
        self._agreed = self._agreed or self._agree()
        return self._agreed

    def wait(self, seconds: float) -> None:
        """Wait for some seconds, or until a stop is requested."""
        self._event.wait(seconds)

    def obey(self, message: str) -> None:
        """Raise `Stopped` if a stop is requested."""
        if self.is_set():
            raise Stopped(message, self.number or signal.SIGTERM)


_outermost: Request | None = None


@contextlib.contextmanager
def requests(agree: Callable[[], bool] | None = None) -> Iterator[Request]:
    """Yield the stop request that SIGINT, SIGTERM and SIGHUP make; that of the outermost context, if they are nested.

    A second signal, after `FORCED_AFTER` seconds, acts as it would without this. Outside the main thread, which alone
    receives signals, no stop is requested.

    Args:
      agree: in a job of several processes, whether they stop now. JAX then handles SIGTERM and tells all of
        them; other signals are sent again as SIGTERM.
    """
    global _outermost
    if threading.current_thread() is not threading.main_thread():
        yield Request(agree)
        return
    if _outermost is not None:
        yield _outermost
        return
    request, asked = Request(agree), 0.0
    handlers = {number: signal.getsignal(number) for number in SIGNALS if agree is None or number != signal.SIGTERM}
    # A signal that is ignored, as SIGINT is in a shell's background job and SIGHUP under nohup, stays ignored.
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def handle(number: int, _: object) -> None:
        nonlocal asked
        if request.number is None:
            asked = time.monotonic()
            request.make(number)
            if agree is not None:
                signal.raise_signal(signal.SIGTERM)
        elif time.monotonic() - asked > FORCED_AFTER:
            signal.signal(number, handlers[signal.Signals(number)])
            signal.raise_signal(number)

    for number in handlers:
        signal.signal(number, handle)
    _outermost = request
    try:
        yield request
    finally:
        _outermost = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
