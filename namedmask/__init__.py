__version__ = "0.1.0"

_front = dict(run="pipeline", Run="pipeline", Settings="config", UserError="core")  # what a user needs, imported when first used


def __getattr__(name):
    if name not in _front: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_front[name]}"), name)


def __dir__(): return sorted([*globals(), *_front])
