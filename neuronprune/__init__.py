"""Pruning of neural networks: scores, masks, surgery and records.

The names typed first are here; the module of each is loaded when it is asked for."""
import importlib, sys, types

__version__ = "0.1.0"

_HOME = dict(
    prune='pipeline', study='study', jobs='study', job='job', learner='train', as_learner='train', fit='train',
    evaluate='evaluation', dense='sources', own='sources', get_dls='data', build='models', trace='graph',
    allocate='allocate', shrink='surgery', apply='surgery', Scores='masks', Mask='masks', Report='report',
    methods='core', compare='report', plot_tradeoff='tradeoff')
_MODULES = {*_HOME.values(), 'mint', 'mip', 'provable', 'baselines', 'lowrank', 'criteria', 'sampling', 'search', 'all'}

class _Callable(types.ModuleType):
    "A module that can be called like its function of the same name: `neuronprune.allocate(…)`."
    def __call__(self, *args, **kw): return vars(self)[self.__name__.rpartition('.')[2]](*args, **kw)
    @property
    def __wrapped__(self): return vars(self)[self.__name__.rpartition('.')[2]]

class _Front(types.ModuleType):
    def __setattr__(self, name, value): # the import system puts a loaded module here
        if _HOME.get(name) == name and type(value) is types.ModuleType: value.__class__ = _Callable
        super().__setattr__(name, value)

sys.modules[__name__].__class__ = _Front

def __getattr__(name):
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'neuronprune' has no attribute {name!r}")
    module = importlib.import_module(f"neuronprune.{_HOME.get(name, name)}")
    return module if _HOME.get(name, name) == name else getattr(module, name)

def __dir__(): return sorted({'__version__', *_HOME})
