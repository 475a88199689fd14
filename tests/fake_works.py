"""Works for `qlora bench` with contenders that misbehave. The measuring process imports this module."""

import functools
import os
import signal
import time

from qlora.bench.measure import Limits
from qlora.bench.works import Case, Work


def fixed_limits(device, dtype):
    return Limits(1e9, 1e10)


def sleeps(seconds):
    return lambda i: time.sleep(seconds)


def raises(error):
    def call(i):
        raise error

    return call


def dies(i):
    os.kill(os.getpid(), signal.SIGKILL)


def dying():
    return dies


def interrupts(calls_before):
    """Sends Ctrl-C to this process and its parent, as a terminal does, in one of its calls."""
    made = []

    def call(i):
        made.append(i)
        if len(made) == calls_before + 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        time.sleep(0.04)

    return call


def missing():
    raise ImportError("No module named 'peer'")


def hangs():
    time.sleep(60)


def case(contenders):
    """A case of one contender each: what makes it, and the arguments. None: it is an error to make it."""
    prepare = {
        name: (lambda make=make, arguments=arguments: make(*arguments)) if arguments is not None else make
        for name, (make, arguments) in contenders.items()
    }
    return Case(1e6, 1e6, prepare)


def work(name="fake", m=1, also=(), **contenders):
    names = (*contenders, *also)
    return Work(name, {"m": m, "n": 2, "k": 3, "r": 0}, names, 12.0, functools.partial(case, contenders))


def broken_build():
    dies(0)


def broken(name="broken"):
    return Work(name, {"m": 1, "n": 2, "k": 3, "r": 0}, ("qlora",), 12.0, broken_build)
