"""What an import loads: scoring needs torch and little else, whatever is heavy comes with the function that uses it.

One fresh interpreter imports the modules one after the other, the lightest first, and says after each what is there."""
import ast, importlib, inspect, json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = ['core', 'files', 'graph', 'masks', 'allocate', 'surgery', 'inputs', 'draws', 'blocks', 'models']
METHODS = ['mint', 'mip', 'provable', 'baselines', 'lowrank', 'criteria', 'sampling', 'energy', 'energy_ising']
NEVER = {'torchvision', 'torchvision.models', 'papermill', 'cvxpy', 'cvxopt', 'sklearn.cluster', 'sklearn.neighbors',
         'IPython', 'ipykernel',
         'dask', 'ray', 'torch._dynamo', 'torch.onnx'}   # not even by neuronprune.all
HEAVY = NEVER | {'fastai', 'pandas', 'matplotlib', 'sklearn', 'scipy.stats'} # not by a method
LIMIT = 400 # lines of code a module may have, blank lines and comments aside
LONGER = set()
CODE = """
import importlib, json, sys
import torch
before, res = set(sys.modules), {}
for o in sys.argv[1:]:
    importlib.import_module('neuronprune.'+o)
    if o == 'core': sys.modules['neuronprune.core'].methods().__iter__()
    res[o] = sorted(set(sys.modules)-before)
print(json.dumps(res))
"""

@pytest.fixture(scope='module')
def loaded():
    "Module -> what is loaded, beyond torch's own, once it and those before it are imported."
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', CODE, *GROUND, *METHODS, 'data', 'all'],
                         capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {k:set(v) for k,v in json.loads(run.stdout).items()}

def ours(names): return {o.split('.')[1] for o in names if o.startswith('neuronprune.')}

@pytest.mark.parametrize('name', GROUND+METHODS)
def test_scoring_loads_nothing_heavy(loaded, name): assert sorted(HEAVY & loaded[name]) == []

@pytest.mark.parametrize('name', GROUND[:6])
def test_the_wiring_loads_no_scipy(loaded, name): assert sorted({'scipy', 'joblib', 'fasthtml'} & loaded[name]) == []

def test_data_brings_fastai_but_no_torchvision(loaded):
    assert 'fastai.data.load' in loaded['data'] and not {'sklearn', 'fastai.learner', *NEVER} & loaded['data']

def test_everything_at_once(loaded): assert 'fastai.learner' in loaded['all'] and not NEVER & loaded['all']

def test_a_method_loads_no_other(loaded):
    assert not set(METHODS) & ours(loaded[GROUND[-1]]), 'neither listing the methods nor what they stand on loads one'
    for i,name in enumerate(METHODS): assert set(METHODS) & ours(loaded[name]) == set(METHODS[:i+1])

@pytest.mark.parametrize('name', GROUND+METHODS)
def test_signatures_can_be_read(name):
    "The pages evaluate annotations in the module: one that names a module imported elsewhere cannot be written."
    mod = importlib.import_module(f'neuronprune.{name}')
    for o in map(vars(mod).get, mod.__all__):
        for f in (vars(o).values() if inspect.isclass(o) else [o]):
            if inspect.isfunction(f): inspect.signature(f, eval_str=True)

def test_mip_offers_the_names_of_its_chapters():
    "What is typed from `mip` is where it always was, and the chapters stand on each other in one direction."
    mip, program, relax, solve = (importlib.import_module(f'neuronprune.{o}') for o in
                                  ('mip', 'mip_program', 'mip_relax', 'mip_solve'))
    for o in ('ClassBalanceError', 'Problem', 'chain', 'interval', 'modules_in_order', 'problem', 'reduce', 'run'):
        assert o in mip.__all__ and getattr(mip, o) is getattr(program, o)
    for o in ('NoIncumbentError', 'SolverNotSuitableError'):
        assert o in mip.__all__ and getattr(mip, o) is getattr(solve, o)
    own = lambda m: {o for o in re.findall(r'^ *from \.(mip\w*) import', inspect.getsource(m), re.M)}
    assert (own(relax), own(program), own(solve)) == (set(), {'mip_relax'}, {'mip_relax'})

def test_the_callback_of_slimming_comes_when_asked_for():
    from neuronprune import baselines, regularize
    assert baselines.SlimmingCallback is regularize.SlimmingCallback and 'SlimmingCallback' in baselines.__all__
    with pytest.raises(AttributeError, match="no attribute 'Slimming'"): baselines.Slimming

MODULES = {p.stem: p.read_text(encoding='utf-8') for p in sorted((ROOT/'neuronprune').glob('*.py'))
           if not p.stem.startswith('_')}
def n_lines(text): return sum(bool(o.strip()) and not o.lstrip().startswith('#') for o in text.splitlines())

@pytest.mark.parametrize('name', MODULES)
def test_a_module_is_short(name):
    assert (n_lines(MODULES[name]) > LIMIT) == (name in LONGER), (
        'cut it; or, if it has become shorter, strike it off the list')

def at_the_top(text):
    "Modules of the package that a module imports while it is itself imported."
    for n in ast.parse(text).body:
        if not isinstance(n, ast.ImportFrom): continue
        inner = (n.module or '' if n.level else (n.module.split('.', 1)+[''])[1]
                 if n.module.split('.')[0] == 'neuronprune' else None)
        if inner is not None: yield from [inner] if inner else [a.name for a in n.names if a.name in MODULES]

def test_imports_go_round_no_circle():
    left = {k:set(at_the_top(v)) for k,v in MODULES.items()}
    assert left['masks'] >= {'core', 'files', 'graph'} and 'masks' not in left['graph']
    while free := [k for k,v in left.items() if not v]: left = {k:v-set(free) for k,v in left.items() if k not in free}
    assert not left, f'a circle, or what stands on one: {left}'
