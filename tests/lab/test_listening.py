"""A server ends by SIGTERM, and leaves the process as it was."""

from __future__ import annotations

import signal

import pytest

from blockwright.lab.listening import until_signal


def test_signal_is_as_before_even_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), until_signal():
        signal.raise_signal(signal.SIGTERM)  # uvicorn does, once all has ended
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
