"""The experiments page through papermill, one run per registered method, and grids of runs."""
import json, os, shutil, time
from pathlib import Path
import nbformat, papermill as pm, pytest
from neuronprune.batch import PARAMETERS, check_parameters, complete, gather, grid, load_grid, notebook_path, run, run_all, run_folder, tuning
from neuronprune.core import methods
from neuronprune.files import DamagedFileError
from neuronprune.report import Report

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(epochs=2, fine_tune_epochs=1)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    return out, run_all([dict(method=m, **QUICK) for m in ('mint', 'random')], n_jobs=2, out=out, threads=1, progress=False)

def test_runs_of_a_grid(runs):
    out, df = runs
    assert list(df.error) == ['']*2 and [r.method for r in df.record] == list(df.method)
    assert [Path(f).name for f in df.folder] == [r.extra['run'] for r in df.record]
    assert len(gather(out)) == 2 and len(list(out.glob('*/page.ipynb'))) == 2 and not list(out.glob('*/failed.ipynb'))

PAGES = 'lth', 'snip', 'mip', 'slimming', 'sipp', 'pfp', 'svd' # weights rewound and at the start; channels, with a network of its own; bounds; ranks (blocks: `runs`)

@pytest.mark.parametrize('names', [PAGES, pytest.param(tuple(methods()), marks=pytest.mark.slow)], ids=['each kind', 'all'])
def test_every_method_runs_in_one_kernel(pages, tmp_path, names):
    cases = [dict(method=m, out=str(tmp_path), **QUICK) for m in names]
    shown = pages(notebook_path(), cases)
    records = {r.method: r for r in gather(tmp_path)}
    assert set(records) == set(names) and all('after fine-tuning' in o for o in shown)
    for c in cases:
        r = records[c['method']]; assert r.extra['run'] == run_folder(c).name
        assert r.dataset == 'digits' and r.tuned.n == 359 and r.params_removed > .2
    assert len({r.before.k for r in records.values() if r.method != 'slimming'}) == 1, 'one dense network for all'

def test_resume_does_nothing_twice(runs):
    out, df = runs; page = next(out.glob('*/page.ipynb')); stamp = page.stat().st_mtime; t = time.time()
    again = run_all([dict(method=m, **QUICK) for m in df.method], n_jobs=1, out=out, progress=False)
    assert time.time()-t < 5 and page.stat().st_mtime == stamp
    assert [r.tuned for r in again.record] == [r.tuned for r in df.record]
    assert len({r.before.k for r in df.record}) == 1

def test_names_on_a_page_that_ran_before():
    mine = dict(sparsity=.4, own={}, bounds=None, frames={}, tune_lr=.1, twin=None, scratch=3)
    with pytest.raises(ValueError, match="parameter='own'"): check_parameters(mine)
    assert check_parameters(mine, again=True)['sparsity'] == .4 and 'scratch' not in check_parameters(mine, again=True)
    for typo in ('sparsty', 'seeds', 'epoch', 'metod', 'methodargs'):
        for again in (False, True):
            with pytest.raises(ValueError, match=f"parameter='{typo}'.*did you mean"): check_parameters({typo: [3] if typo == 'seeds' else 3}, again=again)

def write_record(out, params, **kw):
    d = run_folder(params, out); p = complete(params)
    Report(**{**dict(method=p['method'], model=p['model'], seed=p['seed'], sparsity=p['sparsity'], extra=dict(run=d.name)), **kw}).save(d/'record.json')
    return d/'record.json'

def test_records_of_another_run_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('papermill.execute_notebook', lambda *a, **k: pytest.fail('it ran'))
    asked = dict(method='random', sparsity=.3, seed=2)
    f = write_record(tmp_path, asked); assert run(asked, out=tmp_path) == Report.load(f)
    assert write_record(tmp_path, asked, extra={}) == f and run(asked, out=tmp_path).seed == 2, 'records of earlier versions do not say'
    for kw in (dict(extra=dict(run='random-0123456789abcdef')), dict(extra={}, seed=1), dict(extra={}, method='mint'), dict(extra={}, model='vgg16'), dict(extra={}, sparsity=.5)):
        write_record(tmp_path, asked, **kw)
        with pytest.raises(DamagedFileError, match=f'path=.*{f.parent.name}/record.json.*another run.*delete it'): run(asked, out=tmp_path)
        row = run_all([asked], out=tmp_path, progress=False).iloc[0]; assert row.record is None and 'record.json' in row.error

@pytest.mark.parametrize('text', ['', '{}', '[]', '{"method": "random"}', 'no'])
def test_broken_records(tmp_path, monkeypatch, text):
    monkeypatch.setattr('papermill.execute_notebook', lambda *a, **k: pytest.fail('it ran'))
    good, bad = dict(method='random', seed=1), dict(method='random', seed=2)
    write_record(tmp_path, good); f = write_record(tmp_path, bad); f.write_text(text)
    with pytest.raises(DamagedFileError, match=f'path=.*{f.parent.name}/record.json'): run(bad, out=tmp_path)
    with pytest.warns(UserWarning, match=f'left out: path=.*{f.parent.name}/record.json'): assert [r.seed for r in gather(tmp_path)] == [1]

def test_a_copied_run_counts_once(tmp_path):
    f = write_record(tmp_path, dict(method='random')); shutil.copytree(f.parent, tmp_path/'zcopy')

    with pytest.warns(UserWarning, match='zcopy.*the same run as'): assert len(gather(tmp_path)) == 1

SPY = """
import functools as _functools, json as _json, pathlib as _pathlib
from neuronprune import chain as _chain, sources as _sources, train as _train
_seen, _fit = [], getattr(_train.fit, '__wrapped__', _train.fit)
@_functools.wraps(_fit)
def _spy(learn, epochs, lr=None, **kw):
    r = _fit(learn, epochs, lr, **kw)
    _seen.append(dict(lr=learn.lr if lr is None else lr, wd=learn.opt.opt.param_groups[0]['weight_decay'], schedule=kw.get('schedule')))
    (_pathlib.Path(out)/'fits.json').write_text(_json.dumps(_seen)); return r
_train.fit = _chain.fit = _sources.fit = _spy
"""

def test_the_fine_tuning_has_its_own_schedule(tmp_path, pages):
    first, own = dict(schedule='flat'), dict(lr=.02, wd=.03, schedule='cosine')
    base = dict(method='random', unit='group', lr=.1, opt_args=dict(wd=.01), fit_args=first, tune_args=own, **QUICK)
    dense, tune = dict(lr=.1, wd=.01, **first), own
    cases = [({}, [dense, tune, tune]), (dict(channel_form=False), [dense, tune]), (dict(channel_form=False, tune_args={}), [dense, dense])]
    for k in range(len(cases)): (tmp_path/str(k)).mkdir()
    pages(notebook_path(), [{**base, **more, 'out': str(tmp_path/str(k))} for k,(more,_) in enumerate(cases)], SPY)
    for k,(_, want) in enumerate(cases): assert json.loads((tmp_path/str(k)/'fits.json').read_text()) == want

def test_page_reads_like_a_report(runs):
    page = next(p for p in runs[0].glob('*/page.ipynb') if p.parent.name.startswith('mint'))
    nb = json.loads(page.read_text()); cells = nb['cells']
    shown = ''.join(json.dumps(c.get('outputs', [])) for c in cells)
    assert '**mint**' in shown and 'after fine-tuning' in shown and shown.count('image/png') >= 4 and '"error"' not in shown
    assert [c for c in cells if 'record' in c['metadata'].get('tags', [])]

def test_failures_stay_where_they_happen(tmp_path):
    cell = lambda source, *tags: nbformat.v4.new_code_cell(source, metadata=dict(tags=list(tags)))
    python = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(metadata=python, cells=[cell('sparsity = .5', 'parameters'), cell("raise ValueError(f'{sparsity=}')")]), tmp_path/'page.ipynb')
    df = run_all([dict(method='random', sparsity=1.5)], n_jobs=1, out=tmp_path/'runs', notebook=tmp_path/'page.ipynb', progress=False)
    assert list(df.record) == [None] and 'sparsity=1.5' in df.error[0]
    left = [f.name for f in (tmp_path/'runs').glob('*/*')]; assert left == ['failed.ipynb']

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
