"""The experiments page through papermill, one run per registered method, and grids of runs."""
import json, os, subprocess, sys, time
from pathlib import Path
import papermill as pm, pytest
from neuronprune.batch import PARAMETERS, check_parameters, complete, gather, grid, load_grid, notebook_path, run, run_all, run_folder, tuning
from neuronprune.core import methods
from neuronprune.report import Report

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(epochs=2, fine_tune_epochs=1)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs'); t = time.time()
    return out, run_all([dict(method=m, **QUICK) for m in methods()], n_jobs=2, out=out, threads=1, progress=False), time.time()-t

def test_every_method_runs(runs):
    out, df, secs = runs
    assert list(df.error) == ['']*len(df)
    for m,r in zip(df.method, df.record):
        assert r.method == m and r.dataset == 'digits' and r.tuned.n == 359 and r.params_removed > .2
    assert secs < 90*len(df)/2
    assert len(gather(out)) == len(df) and not list(out.glob('*/failed.ipynb'))

def test_runs_share_the_dense_network(runs):
    df = runs[1]
    assert len({r.before.k for m,r in zip(df.method, df.record) if m != 'slimming'}) == 1

def test_resume_does_nothing_twice(runs):
    out, df, _ = runs; page = next(out.glob('*/page.ipynb')); stamp = page.stat().st_mtime; t = time.time()
    again = run_all([dict(method=m, **QUICK) for m in methods()], n_jobs=1, out=out, progress=False)
    assert time.time()-t < 5 and page.stat().st_mtime == stamp
    assert [r.tuned for r in again.record] == [r.tuned for r in df.record]

SPY = """import functools, json
from pathlib import Path
from neuronprune import train
_seen, _real = [], train.fit
@functools.wraps(_real)
def spy(learn, epochs, lr=None, **kw):
    r = _real(learn, epochs, lr, **kw)
    _seen.append(dict(lr=learn.lr if lr is None else lr, wd=learn.opt.opt.param_groups[0]['weight_decay'], schedule=kw.get('schedule')))
    (Path(out)/'fits.json').write_text(json.dumps(_seen)); return r
train.fit = spy
from neuronprune import pipeline
pipeline.fit = spy
"""

def test_the_fine_tuning_has_its_own_schedule(tmp_path):
    nb = json.loads(notebook_path().read_text())
    at = next(i for i,c in enumerate(nb['cells']) if 'parameters' in c['metadata'].get('tags', []))
    nb['cells'].insert(at+1, dict(cell_type='code', id='spy', metadata={}, source=SPY, outputs=[], execution_count=None))
    (tmp_path/'spied.ipynb').write_text(json.dumps(nb)); first = dict(schedule='flat'); own = dict(lr=.02, wd=.03, schedule='cosine')
    base = dict(method='random', unit='group', lr=.1, opt_args=dict(wd=.01), fit_args=first, tune_args=own, **QUICK)
    dense, tune = dict(lr=.1, wd=.01, **first), own
    for k,(more, want) in enumerate([({}, [dense, tune, tune]), (dict(channel_form=False), [dense, tune]), (dict(channel_form=False, tune_args={}), [dense, dense])]):
        run({**base, **more}, out=tmp_path/str(k), notebook=tmp_path/'spied.ipynb')
        assert json.loads((tmp_path/str(k)/'fits.json').read_text()) == want

def test_page_reads_like_a_report(runs):
    page = next(p for p in runs[0].glob('*/page.ipynb') if p.parent.name.startswith('mint'))
    nb = json.loads(page.read_text()); cells = nb['cells']
    shown = ''.join(json.dumps(c.get('outputs', [])) for c in cells)
    assert '**mint**' in shown and 'after fine-tuning' in shown and shown.count('image/png') >= 4 and '"error"' not in shown
    assert [c for c in cells if 'record' in c['metadata'].get('tags', [])]

def test_failures_stay_where_they_happen(tmp_path):
    df = run_all([dict(method='random', sparsity=1.5, **QUICK), dict(method='random', dataset='digts', **QUICK)], n_jobs=1, out=tmp_path, progress=False)
    assert list(df.record) == [None, None]
    assert 'did you mean' in df.error[1] and 'sparsity=1.5' in df.error[0]
    assert len(list(tmp_path.glob('*/failed.ipynb'))) == 2 and not list(tmp_path.glob('*/page.ipynb')) and not list(tmp_path.glob('*/record.json'))

def test_unknown_parameter_fails_loudly(tmp_path):
    with pytest.raises(pm.exceptions.PapermillExecutionError, match="did you mean 'method'"):
        pm.execute_notebook(str(notebook_path()), str(tmp_path/'x.ipynb'), dict(metod='random'), kernel_name='python3', progress_bar=False)

def test_defaults_of_page_and_package_agree():
    cell = next(c for c in json.loads(notebook_path().read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    ns = {}; exec(''.join(cell['source']), ns); ns.pop('__builtins__')
    assert ns == PARAMETERS

def test_folder_is_a_function_of_all_parameters():
    base = run_folder(dict(method='mint'))
    assert base == run_folder(dict(PARAMETERS)) == run_folder(dict(method='mint', out='elsewhere'))
    assert len({run_folder({'method': 'mint', k:v}) for k,v in dict(seed=1, sparsity=.6, method_args={'n_groups': [2, 2]}, rounds=2).items()} | {base}) == 5

@pytest.mark.parametrize('path', sorted(p for p in (ROOT/'nbs'/'params').rglob('*.yml') if p.parent.name != 'provable'), ids=lambda p: f'{p.parent.name}/{p.name}')
def test_parameter_files(path):
    g = load_grid(path)
    assert g and all(check_parameters(p) for p in g) and len({run_folder(p) for p in g}) == len(g)

@pytest.mark.parametrize('name', ['mnist_mlp', 'cifar10_vgg16', 'cifar10_resnet56', 'imagenet_resnet50', 'digits'])
def test_a_setting_has_its_controls(name):
    g = [complete(p) for p in load_grid(ROOT/'nbs'/'params'/'mint'/f'{name}.yml')]
    rows = lambda m: {(p['sparsity'], p['seed']) for p in g if p['method'] == m and p['sparsity']}
    blocks = lambda p: {k:p['method_args'].get(k) for k in ('layers', 'n_groups', 'caps')}
    assert rows('mint') and rows('mint') == rows('random') == rows('magnitude')
    assert {p['seed'] for p in g if p['sparsity'] == 0} == {p['seed'] for p in g}
    assert all(blocks(p) == blocks(g[0]) and p['unit'] == 'group' and tuning(p) == tuning(g[0]) for p in g)
    assert len({json.dumps({k:p[k] for k in ('lr', 'epochs', 'opt_args', 'fit_args', 'weights')}, sort_keys=True) for p in g}) == 1

def test_resnet56_is_retrained_as_published():
    p = complete(load_grid(ROOT/'nbs'/'params'/'mint'/'cifar10_resnet56.yml')[0])
    assert (p['lr'], p['opt_args']['wd'], p['fit_args']) == (.01, 2e-4, dict(schedule='step', milestones=[150, 225], gamma=.1))
    assert tuning(p) == (.1, 5e-4, dict(schedule='step', milestones=[90, 180, 260], gamma=.2))

def test_grid_messages(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'sparsity'"): grid(sparsities=[.5])
    (tmp_path/'bad.yml').write_text('bse: {}\n')
    with pytest.raises(ValueError, match="did you mean 'base'"): load_grid(tmp_path/'bad.yml')
    for bad, err, words in [('- {sparsities: 0.5}', ValueError, "did you mean 'sparsity'"), ('- mint', TypeError, 'grid: expected a dict')]:
        (tmp_path/'bad.yml').write_text(f'grid:\n  {bad}\n')
        with pytest.raises(err, match=words): load_grid(tmp_path/'bad.yml')

def test_a_list_of_grids(tmp_path):
    f = tmp_path/'g.yml'
    f.write_text('base: {method: mint, sparsity: 0.9, seed: 3}\ngrid:\n  - {sparsity: [0.5, 0.9]}\n  - {method: [random, snip], seed: [0, 1]}\n  - {}\n')
    assert [(p['method'], p['sparsity'], p['seed']) for p in load_grid(f)] == [
        ('mint', .5, 3), ('mint', .9, 3), ('random', .9, 0), ('random', .9, 1), ('snip', .9, 0), ('snip', .9, 1), ('mint', .9, 3)]
    f.write_text('base: {fit_args: {schedule: step, milestones: [2, 4]}}\ngrid: {seed: [0, 1]}\n'); one = load_grid(f)
    f.write_text('base: {fit_args: {schedule: step, milestones: [2, 4]}}\ngrid: [{seed: 0}, {seed: 1}]\n')
    assert one == load_grid(f) and [p['seed'] for p in one] == [0, 1] and all(p['fit_args']['milestones'] == [2, 4] for p in one)

@pytest.mark.slow
@pytest.mark.skipif(not (Path(os.environ.get('NEURONPRUNE_DATA', '/nonexistent'))/'MNIST').exists(), reason='NEURONPRUNE_DATA holds no MNIST')
def test_mnist(tmp_path):
    r = run(dict(method='mint', dataset='mnist', data_root=os.environ['NEURONPRUNE_DATA'], epochs=1, fine_tune_epochs=1, batch_size=256,
                 method_args=dict(n_per_class=60, n_groups=[10, 10])), out=tmp_path)
    assert r.tuned.n == 10000 and r.tuned.accuracy > .9

def test_values_are_checked_before_any_training():
    for bad, words in [(dict(sparsity=50), 'did you mean 0.5'), (dict(unit='neuron'), "unit='neuron'"), (dict(rounds=0), 'rounds=0'), (dict(model='mpl'), "did you mean 'mlp'"),
                       (dict(method_args={'n_group': 3}), "did you mean 'n_groups'"), (dict(epochs=1.5), 'epochs=1.5'), (dict(scope='local'), "scope='local'"),
                       (dict(fit_args={'schedul': 'flat'}), "did you mean 'schedule'"), (dict(fit_args={'seed': 3}), "fit_args='seed'"), (dict(tune_args={'cbs': []}), "tune_args='cbs'"), (dict(tune_args={'shedule': 'flat'}), "did you mean 'schedule'"),
                       (dict(tune_args={'wdd': .1}), "did you mean 'wd'"), (dict(tune_args={'wd': '5e-4'}), "wd='5e-4'"), (dict(tune_args={'lr': 0}), 'lr=0'),
                       (dict(tune_args={'milestones': [3]}), "expects none"), (dict(fit_args={'schedule': 'step', 'milestones': [3]}, tune_args={'schedule': 'flat'}), 'expects none'),
                       (dict(tune_args=[.1]), 'tune_args'), (dict(channel_form=0), 'channel_form')]:
        with pytest.raises((ValueError, TypeError)) as e: check_parameters(bad)
        assert words in str(e.value)

def test_a_typo_in_a_grid_stops_it_at_once(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'sparsity'"): run_all([dict(method='random'), dict(sparsty=.5)], out=tmp_path, progress=False)
    with pytest.raises(TypeError, match='grid: expected a list'): run_all(dict(method='random'), out=tmp_path)
    assert not list(tmp_path.iterdir())
