"""Runs described once: their parameters, names and files; studies of many, failures included; the pages."""
import importlib.util, json, os, re, signal, subprocess, sys, threading
from pathlib import Path
import pandas as pd, papermill as pm, pytest
from neuronprune import study as S
from neuronprune.budget import size_list, trained_steps
from neuronprune.core import methods
from neuronprune.data import get_dls
from neuronprune.job import job
from neuronprune.models import build
from neuronprune.parameters import OUT, PARAMETERS, PRUNING, SOURCE, parameters_in
from neuronprune.pipeline import tuning
from neuronprune.report import Report
from neuronprune.sources import own
from neuronprune.study import STUDY, gather, jobs, load_jobs, page_path, read_study, render, study
from neuronprune.train import fit, learner
from test_data import write_idx

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT/'nbs'/'params').rglob('*.yml'))
named = lambda p: f'{p.parent.name}/{p.stem}'
QUICK = dict(model='lenet300', epochs=2, fine_tune_epochs=1, n_train=200, lr=.05)
TIMES = ['secs', 'train_secs', 'latency_before', 'latency_after', 'peak_mib']
def timeless(df): return df.drop(columns=TIMES)

# Parameters

@pytest.mark.parametrize('kw,words', [
    (dict(sparsity=50), 'did you mean 0.5'), (dict(unit='neuron'), "unit='neuron'"), (dict(rounds=0), 'rounds=0'),
    (dict(model='mpl'), "did you mean 'mlp'"),
    (dict(method_args={'n_group': 3}), "did you mean 'n_groups'"), (dict(epochs=1.5), 'epochs=1.5'),
    (dict(scope='local'), "scope='local'"),
    (dict(fit_args={'schedul': 'flat'}), "did you mean 'schedule'"), (dict(fit_args={'seed': 3}), "fit_args='seed'"),
    (dict(tune_args={'cbs': []}), "tune_args='cbs'"), (dict(tune_args={'shedule': 'flat'}), "did you mean 'schedule'"),
    (dict(tune_args={'wdd': .1}), "did you mean 'wd'"), (dict(tune_args={'wd': '5e-4'}), "wd='5e-4'"),
    (dict(tune_args={'lr': 0}), 'lr=0'),
    (dict(tune_args={'milestones': [3]}), 'expects none'), (dict(tune_args=[.1]), 'tune_args'),
    (dict(channel_form=0), 'channel_form'),
    (dict(opt_args={'nesterv': True}), "did you mean 'nesterov'"), (dict(dataset='mnit'), "did you mean 'mnist'"),
    (dict(augment='cropp'), "did you mean 'crop'"),
    (dict(metod='mint'), "did you mean 'method'"), (dict(method='mnt'), "did you mean 'mint'"),
    (dict(sizes=[.5], sparsity=.5), 'sparsity and sizes'),
    (dict(method='magnitude', model='lenet300', sizes=[.001]), 'expected at least'),
    (dict(sizes=[.1, .5]), 'descending'), (dict(rewind=11), 'rewind=11'),
    (dict(start='first'), "start='first'"), (dict(valid_pct=2), 'valid_pct=2'),
    (dict(normalize='unity'), "did you mean 'unit'")])
def test_values_are_checked_before_any_training(kw, words):
    with pytest.raises((ValueError, TypeError), match=words): job(**kw)

def test_names_on_a_page_that_ran_before():
    mine = dict(sparsity=.4, own={}, bounds=None, res=None, scratch=3, CONSTANT=4)
    with pytest.raises(ValueError, match="parameter='own'"): parameters_in(mine, PARAMETERS)
    assert parameters_in(mine, PARAMETERS, again=True) == {'sparsity': .4}
    for typo in ('sparsty', 'epoch', 'metod', 'methodargs'):
        for again in (False, True):
            with pytest.raises(ValueError, match=f"parameter='{typo}'.*did you mean"):
                parameters_in({typo: 3}, PARAMETERS, again)

# Names

def test_one_name_for_one_run():
    a = job('magnitude')
    for same in (dict(sparsity=.5), dict(unit='weight'), dict(shrink=True), dict(at='trained', rewind='none'),
                 dict(name='x'), dict(data_root='y'),
                 dict(lr=.1), dict(valid_pct=.1), dict(model='mlp'), dict(channel_form=False),
                 dict(fine_tune_epochs=5)):
        assert job('magnitude', **same).id == a.id
    others = [dict(seed=1), dict(sparsity=.6), dict(method_args={'norm': 'l1'}), dict(rounds=2), dict(model='lenet300'),
              dict(lr=.2), dict(sizes=[.5])]
    assert len({job('magnitude', **o).id for o in others} | {a.id}) == len(others)+1
    assert job('magnitude', sparsity=0).id == job('magnitude', sparsity=0.).id
    assert job('magnitude', sizes=dict(hi=.4, lo=.1, count=2)).id == job('magnitude', sizes=[.4, .1]).id
    assert a.but(seed=1).id == job('magnitude', seed=1).id

# Files

@pytest.mark.parametrize('path', FILES, ids=named)
def test_parameter_files(path):
    d, js = read_study(path), load_jobs(path)
    assert js and len({j.id for j in js}) == len(js) and len(d['about']) > 20
    names = {j.params['name'] for j in js}
    assert 'methods' not in d or names == set(d['methods'])

SHORT = dict(epochs=1, fine_tune_epochs=1, milestones=[1], n=3, n_valid=4)
def shorter(d):
    "Parameters in which every length is that of `SHORT`."
    return {k:shorter(v) if isinstance(v, dict) else SHORT.get(k, v) for k,v in d.items()}

@pytest.mark.parametrize('name', ['fashion_mnist_resnet18', 'kmnist_resnet18'])
def test_every_row_of_a_file_runs(tmp_path, name):
    "All parameters as in the file, but short, on few images and a small network."
    path = ROOT/'nbs'/'params'/'energy'/f'{name}.yml'; d = read_study(path)
    write_idx(tmp_path/dict(fashion_mnist='FashionMNIST', kmnist='KMNIST')[d['dataset']]/'raw', 60, 8)
    over = dict(shorter(d), model='lenet5', n_train=16, batch_size=8, grid=dict(seed=[0]))
    df = study(load_jobs(path, **over, data_root=str(tmp_path)), out=tmp_path/'runs', progress=False)
    assert not df.error.any() and set(df.name) == set(d['methods'])
    found = {n:Report.load(tmp_path/'runs'/f/'record.json').extra.get('search') for n,f in zip(df.name, df.folder)}
    assert {k:v and v['evaluations'] for k,v in found.items()} == {
        'EDropout': 8+9, 'Ising': 8+9, 'random, fixed': None, 'best of random': 3, 'magnitude': None}

@pytest.mark.parametrize('name', ['mnist_mlp', 'cifar10_vgg16', 'cifar10_resnet56', 'imagenet_resnet50', 'digits'])
def test_a_setting_has_its_controls(name):
    js = load_jobs(ROOT/'nbs'/'params'/'mint'/f'{name}.yml'); ps = [{**j.params, **j.source.params} for j in js]
    rows = lambda n: {(p['sparsity'], p['seed']) for p in ps if p['name'] == n and p['sparsity']}
    blocks = lambda p: {k:p['method_args'].get(k) for k in ('layers', 'n_groups', 'caps')}
    assert rows('MINT') and rows('MINT') == rows('random blocks') == rows('smallest blocks')
    assert {p['seed'] for p in ps if p['sparsity'] == 0} == {p['seed'] for p in ps}
    assert all(blocks(p) == blocks(ps[0]) and p['unit'] == 'group' and p['tune_args'] == ps[0]['tune_args'] for p in ps)
    assert len({json.dumps(j.source.key, sort_keys=True) for j in js}) == 1

def test_resnet56_is_retrained_as_published():
    p = (j := load_jobs(ROOT/'nbs'/'params'/'mint'/'cifar10_resnet56.yml')[0]).source.params
    assert ((p['lr'], p['opt_args']['wd'], p['fit_args'])
            == (.01, 2e-4, dict(schedule='step', milestones=[150, 225], gamma=.1)))
    assert (tuning(None, p['fit_args'], j.params['tune_args'])
            == (.1, 5e-4, dict(schedule='step', milestones=[90, 180, 260], gamma=.2)))

# data set and network: epochs of training and fine-tuning, batch, learning rate, weight decay, Nesterov, milestones,
# factor, warm-up of training and fine-tuning, first and last size, how many, how many of them fine-tuned, networks,
# delta
PAPERS = {
    'mnist_lenet300':     (40, 40, 64, .01, 1e-4, False, [30, 45], .1, 0, 0, .442, .049, 12, 12, 3, 1e-12),
    'mnist_lenet5':       (40, 40, 64, .01, 1e-4, False, [25, 35], .1, 0, 0, .5, .02, 15, 15, 3, 1e-9),
    'cifar10_lenet5':     (40, 40, 64, .01, 1e-4, False, [25, 35], .1, 0, 0, .5, .05, 8, 8, 3, 1e-9),
    'cifar10_resnet20':   (182, 182, 128, .1, 1e-4, False, [91, 136], .1, 5, 5, .99, .02, 69, 23, 3, 1e-16),
    'cifar10_resnet56':   (182, 182, 128, .1, 1e-4, False, [91, 136], .1, 5, 5, .99, .02, 60, 20, 3, 1e-16),
    'cifar10_resnet110':  (182, 182, 128, .1, 1e-4, False, [91, 136], .1, 5, 5, .99, .02, 60, 20, 3, 1e-16),
    'cifar10_vgg16':      (300, 150, 256, .05, 5e-4, False, [*range(30, 300, 30)], .5, 10, 5, .99, .02, 60, 20, 3,
                           1e-16),
    'cifar10_densenet22': (300, 300, 64, .1, 1e-4, True, [150, 225], .1, 10, 10, .99, .047, 66, 22, 3, 1e-16),
    'cifar10_wrn16_8':    (200, 200, 128, .1, 5e-4, True, [60, 120, 160], .2, 5, 5, .99, .02, 69, 23, 3, 1e-16),
    'imagenet_resnet18':  (0, 90, 256, .1, 1e-4, False, [30, 60, 80], .1, 0, 5, .9, .1, 18, 18, 1, 1e-16),
    'imagenet_resnet50':  (0, 90, 256, .1, 1e-4, False, [30, 60, 80], .1, 0, 5, .8, .1, 10, 10, 1, 1e-16),
    'imagenet_resnet101': (0, 90, 256, .1, 1e-4, False, [30, 60, 80], .1, 0, 5, .9, .184, 16, 16, 1, 1e-16)}

@pytest.mark.parametrize('name', PAPERS)
def test_the_papers_configurations_are_there(name):
    (epochs, tune_epochs, bs, lr, wd, nesterov, milestones, gamma, warm, tune_warm, first, last, count, tuned, nets,
     delta) = PAPERS[name]
    js = load_jobs(ROOT/'nbs'/'params'/'provable'/f'{name}.yml'); p = {**js[0].params, **js[0].source.params}
    tune_lr, tune_wd, tune = tuning(None, p['fit_args'], p['tune_args'])
    said = (p['epochs'], p['fine_tune_epochs'], p['batch_size'], p['opt'], p['lr'], tune_lr, tune_wd)
    assert said == (epochs, tune_epochs, bs, 'sgd', lr, None, None)
    # momentum .9 is the learner's default
    assert p['opt_args'] == dict(wd=wd, **(dict(nesterov=True) if nesterov else {}))
    milestone = [25, 35] if name == 'mnist_lenet300' else milestones
    assert ((tune['schedule'], tune['milestones'], tune['gamma'], tune.get('warmup', 0))
            == ('step', milestone, gamma, tune_warm))
    f = p['fit_args']
    if epochs:
        assert (f['schedule'], f['milestones'], f['gamma'], f.get('warmup', 0)) == ('step', milestones, gamma, warm)
    ds = size_list(p['sizes'])
    assert ((round(ds[0], 3), round(ds[-1], 3), len(ds), len(trained_steps(len(ds), p['fine_tunes'])))
            == (first, last, count, tuned))
    assert ((p['start'], p['at'], p['rewind'], len({j.params['seed'] for j in js}))
            == ('previous', 'trained', 'none', nets))
    assert {'PFP', 'PFP, inputs kept', 'filter magnitude'} <= {j.params['name'] for j in js}
    assert ({j.params['method_args'][k] for j in js if j.params['method'] in ('sipp', 'pfp') for k in ('delta', 'c')}
            == {delta, 10})

def test_the_middle_of_the_longer_lists():
    def plan(n): return size_list(read_study(ROOT/'nbs'/'params'/'provable'/f'{n}.yml')['sizes'])
    assert plan('cifar10_resnet20')[:3] == [.99, .855, .85] and plan('cifar10_resnet20')[59:61] == [.15, .132]
    assert (plan('cifar10_densenet22')[59:61] == [.1, .0918]
            and [round(o, 4) for o in plan('cifar10_wrn16_8')[59:61]] == [.1, .0918])
    assert plan('imagenet_resnet18')[11:13] == plan('imagenet_resnet101')[11:13] == [.35, .31]

@pytest.mark.parametrize('text,err,words', [
    ('mthod: mint', ValueError, "did you mean 'method"), ('- mint', TypeError, 'expected a dict'),
    ('methods: {}', ValueError, 'methods: empty'), ('methods: {a: magnitude}', TypeError, r"methods\['a'\]"),
    ('methods: {a: {metod: magnitude}}', ValueError, "did you mean 'method'"),
    ('grid: {seed: 3}', TypeError, 'grid: seed'), ('grid: {seeds: [3]}', ValueError, "did you mean 'seed'"),
    ('grid: {seed: [1, 1]}', ValueError, '1 twice'),
    ('grid: {seed: []}', ValueError, 'empty'), ('base: {method: mint}', ValueError, "parameter='base'"),
    ('level: x', (ValueError, TypeError), 'level'),
    ('n_jobs: 0', ValueError, 'n_jobs=0'), ('grid: !!python/object/apply:os.system [a]', ValueError, 'no plain YAML')])
def test_bad_files(tmp_path, text, err, words):
    (tmp_path/'f.yml').write_text(text+'\n')
    with pytest.raises(err, match=words): load_jobs(tmp_path/'f.yml')

def test_what_varies():
    js = jobs(dict(QUICK, methods={'a': {'method': 'random', 'sparsity': [.2, .4]}, 'magnitude': None},
                   grid=dict(sparsity=[.5, .6], seed=[0, 1])))
    assert [(j.params['name'], j.params['sparsity'], j.params['seed']) for j in js] == [
        ('a', .2, 0), ('a', .4, 0), ('a', .2, 1), ('a', .4, 1), ('magnitude', .5, 0), ('magnitude', .5, 1),
        ('magnitude', .6, 0), ('magnitude', .6, 1)]
    assert ([j.params['sizes'] for j in jobs(dict(QUICK, method='random', grid=dict(sizes=[[.5], [.4, .2]])))]
            == [[.5], [.4, .2]])

# Runs

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Two methods, two seeds, two sizes: (folder, jobs, rows)."
    out = tmp_path_factory.mktemp('small')
    js = jobs(dict(QUICK, sizes=[.5, .2], methods={'weights': {'method': 'magnitude'}, 'snip': {}},
                   grid=dict(seed=[0, 1])))
    return out, js, study(js, out=out, progress=False)

def test_one_row_per_run_and_size(small):
    out, js, df = small
    assert (set(df.error) == {''} and df.name.tolist() == ['weights']*4 + ['snip']*4
            and df.density.tolist() == [.5, .2]*4)
    assert df.dense_k.groupby(df.seed).nunique().tolist() == [1, 1] and len(list((out/'dense').iterdir())) == 2, (
        'the same networks for all')
    assert df.columns[0] == 'error' and sorted(set(df.folder)) == sorted(j.id for j in js)
    assert [r.extra['run'] for r in gather(out)] == sorted(j.id for j in js)

def test_what_is_there_is_not_done_again(small, monkeypatch):
    out, js, df = small
    monkeypatch.setattr('neuronprune.train.fit', lambda *a, **k: pytest.fail('trained'))
    pd.testing.assert_frame_equal(study(js, out=out, progress=False), df)

def test_two_processes_do_the_same(small, tmp_path):
    _, js, df = small
    pd.testing.assert_frame_equal(timeless(study(js, 2, out=tmp_path, progress=False)), timeless(df))

def test_two_labels_of_one_run_do_it_once(small, tmp_path, monkeypatch):
    out, js, df = small; calls, real = [], S._one
    monkeypatch.setattr(S, '_one', lambda *a: (calls.append(1), real(*a))[1])
    again = job('magnitude', **{**QUICK, 'sizes': [.5, .2], 'name': 'twice'})
    both = study([js[0], again], out=out, progress=False)
    assert (len(calls) == 1 and both.name.tolist() == ['weights']*2 + ['twice']*2
            and both.tuned_k[:2].tolist() == both.tuned_k[2:].tolist())

def test_failures_stay_where_they_happen(tmp_path):
    js = jobs(dict(QUICK, sizes=[.5, .2],
                   methods={'fine': {'method': 'magnitude'}, 'boom': {'method': 'random', 'tune_args': {'lr': 1e30}}}))
    with pytest.warns(UserWarning, match='1 of 2 runs failed; the first, boom, said: .*loss is'):
        df = study(js, out=tmp_path, progress=False)
    assert df.name.tolist() == ['fine', 'fine', 'boom'] and (df.error != '').tolist() == [False, False, True]
    assert {'dataset', 'model', 'seed', 'folder'} <= set(df) and df.dataset.tolist() == ['digits']*3

def test_what_cannot_run_is_found_out_untrained(tmp_path, monkeypatch):
    monkeypatch.setattr('neuronprune.sources.fit', lambda *a, **k: pytest.fail('trained'))
    j = job('mint', **dict(QUICK, method_args=dict(n_groups=[900, 900])))
    with pytest.raises(ValueError, match='n_groups'): j.run(tmp_path)
    with pytest.warns(UserWarning, match='1 of 1'): df = study([j], out=tmp_path, progress=False)
    assert 'n_groups' in df.error[0]

def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr('neuronprune.sources.fit', lambda *a, **k: pytest.fail('trained'))
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): job('random', **QUICK).run(tmp_path/'file'/'runs')

def test_a_fine_tuning_with_milestones_of_its_own(tmp_path):
    "They go with the schedule that both trainings share, in the rehearsal, too."
    j = job('random', **QUICK, fit_args=dict(schedule='step', milestones=[1], gamma=.1),
            tune_args=dict(milestones=[.5]))
    assert j.run(tmp_path).rows.tuned_k.notna().all()

def test_a_network_of_ones_own_is_that_of_the_zoo(tmp_path):
    def make(seed):
        dls = get_dls('digits', n_train=200, seed=seed)
        return fit(learner(build('lenet300', 1, 10, 8, seed=seed), dls, lr=.05, seed=seed), 2)
    args = dict(sizes=[.5, .2], fine_tune_epochs=1, seed=3)
    a = job('snip', **{**QUICK, **args}).run(tmp_path/'zoo').rows
    b = job('snip', source=own(make, 'mine'), **args).run(tmp_path/'own').rows
    same = ['step', 'density', 'params_nonzero', 'dense_k', 'pruned_k', 'pruned_loss', 'tuned_k', 'tuned_loss',
            'layers']
    pd.testing.assert_frame_equal(a[same], b[same])

def test_epochs_that_were_not_kept(tmp_path):
    def make(seed):
        return fit(learner(build('lenet300', 1, 10, 8, seed=seed), get_dls('digits', n_train=200), lr=.05), 1)
    with pytest.raises(ValueError, match='rewind=1: your learner has not kept'):
        job('magnitude', source=own(make, 'm'), rewind=1).run(tmp_path)

KILLED = """
import os, signal
from neuronprune import chain, study as S
from neuronprune.study import jobs
real = S._one
def _one(job, out, pages):
    flag = os.path.join(out, 'died')
    if job.params['name'] == 'snip' and not os.path.exists(flag):
        open(flag, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)
    return real(job, out, pages)
S._one = _one
js = jobs(dict(model='lenet300', epochs=2, fine_tune_epochs=1, n_train=200, lr=.05, sizes=[.5, .2],
               methods={'weights': {'method': 'magnitude'}, 'snip': {}}, grid=dict(seed=[0, 1])))
S.study(js, 2, out=OUT, progress=False).to_pickle(OUT + '/df.pkl')
"""

def test_a_worker_that_dies_costs_nothing_else(small, tmp_path):
    (tmp_path/'t.py').write_text(f'OUT = {str(tmp_path)!r}\n{KILLED}')
    r = subprocess.run([sys.executable, '-W', 'ignore', str(tmp_path/'t.py')], capture_output=True, text=True,
                       timeout=300)
    assert r.returncode == 0 and (tmp_path/'died').exists(), r.stderr
    pd.testing.assert_frame_equal(timeless(pd.read_pickle(tmp_path/'df.pkl')), timeless(small[2]))

def test_on_a_cluster(small, tmp_path):
    "Two processes of a Dask cluster on one folder, of which one dies in the middle."
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pid, = (w.pid for w in list(cluster.workers.values())[:1])
        threading.Timer(5, lambda: os.kill(pid, signal.SIGKILL)).start()
        df = study(small[1], 2, out=tmp_path, backend='dask', address=cluster.scheduler_address, progress=False)
    pd.testing.assert_frame_equal(timeless(df), timeless(small[2]))

def test_on_ray(small, tmp_path):
    pytest.importorskip('ray')
    df = study(small[1], 2, out=tmp_path, backend='ray', progress=False)
    pd.testing.assert_frame_equal(timeless(df), timeless(small[2]))

@pytest.mark.parametrize('backend', ['dask', 'ray'])
def test_a_backend_that_is_missing_is_named(small, tmp_path, backend):
    if importlib.util.find_spec(dict(dask='distributed').get(backend, backend)): pytest.skip('it is here')
    with pytest.raises(ImportError, match=rf"neuronprune\[{backend}\]"):
        study(small[1], out=tmp_path, backend=backend, progress=False)

@pytest.mark.parametrize('text', ['', '{}', '[]', '{"method": "random"}', 'no'])
def test_broken_records(small, tmp_path, text):
    for k,t in (('a', (small[0]/small[1][0].id/'record.json').read_text()), ('b', text)):
        (tmp_path/k).mkdir(); (tmp_path/k/'record.json').write_text(t)
    with pytest.warns(UserWarning, match='left out: path=.*record.json'):
        assert [r.method for r in gather(tmp_path)] == ['magnitude']
    (tmp_path/'b'/'record.json').write_text((tmp_path/'a'/'record.json').read_text())
    with pytest.warns(UserWarning, match='the same run as'): assert len(gather(tmp_path)) == 1

# Pages

def parameters_cell(page):
    return next(''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells']
                if 'parameters' in c['metadata'].get('tags', []))

@pytest.mark.parametrize('name,tables',
                         [('experiments', [PRUNING, SOURCE, OUT]), ('comparison', [STUDY, PRUNING, SOURCE, OUT])])
def test_pages_say_what_the_package_does(name, tables):
    want = {k:(f'{k}: {t.__name__} = {v!r}', said) for d in tables for k,(t,v,said) in d.items()}
    got = [l.split(' # ', 1) for l in parameters_cell(page_path(name)).splitlines()]
    assert {a.split(':')[0]:(a.strip(), b) for a,b in got} == want
    r = subprocess.run([sys.executable, '-m', 'papermill', '--help-notebook', str(page_path(name))],
                       capture_output=True, text=True)
    said = ' '.join(r.stdout.split())
    for k,(a,b) in want.items():
        assert f"{k}: {a.split(':')[1].split('=')[0].strip()} (default " in said and ' '.join(b.split()) in said, k

PAGES = ([dict(method=m) for m in ('lth', 'slimming', 'sipp', 'svd', 'edropout')]
         + [dict(method='pfp', sizes=[.6, .4])])

def test_each_kind_of_method_in_one_kernel(pages, tmp_path):
    "Weights rewound, channels, a network of its own, bounds, ranks, a search; sizes with a curve."
    cases = [dict(o, out=str(tmp_path), epochs=2, fine_tune_epochs=1,
                  method_args=dict(epochs=1) if o['method'] == 'edropout' else {}) for o in PAGES]
    shown = pages(page_path(), cases)
    records = {r.method: r for r in gather(tmp_path)}
    assert set(records) == {o['method'] for o in PAGES} and all('after fine-tuning' in o for o in shown)
    assert ['Bounds' in o for o in shown] == [o['method'] == 'sipp' for o in PAGES]
    assert len({r.before.k for r in records.values() if r.method != 'slimming'}) == 1, 'one dense network for all'

def test_no_page_and_no_engine_names_a_method():
    names = sorted(set(methods()) - {'random', 'magnitude', 'uniform'}, key=len)
    text = {p: ' '.join(c for c in (''.join(c['source']) for c in json.loads(page_path(p).read_text(encoding='utf-8'))[
        'cells'] if c['cell_type'] == 'code'
                        and 'parameters' not in c['metadata'].get('tags', []))) for p in ('experiments', 'comparison')}
    text |= {p: (ROOT/'neuronprune'/f'{p}.py').read_text()
             for p in ('chain', 'pipeline', 'sources', 'study', 'tradeoff')}
    assert not [(p, n) for p,t in text.items() for n in names if re.search(rf"['\"]{n}['\"]", t)]

def test_a_page_is_rendered_from_a_finished_run(small, monkeypatch):
    out, js, df = small; j = js[0]
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    before = {p:p.stat().st_mtime_ns for p in j.folder(out).iterdir()}
    page = render(j.folder(out)); nb = json.loads(page.read_text())
    shown = json.dumps([c.get('outputs', []) for c in nb['cells']])
    assert ('**magnitude**' in shown and 'after fine-tuning' in shown and shown.count('image/png') >= 4
            and '"error"' not in shown)
    assert all(p.stat().st_mtime_ns == t for p,t in before.items() if p.name not in ('record.json', 'try.json')), (
        'nothing is computed again')

def test_a_page_of_several_blocks(pages, tmp_path):
    mint = dict(method='mint', out=str(tmp_path), epochs=2, fine_tune_epochs=1,
                method_args=dict(n_groups=[10, 10], n_trials=1, n_per_class=10))
    shown = pages(page_path(), [mint])
    assert all('spent on channels' in o for o in shown)

def test_the_comparison_page_runs_twice_in_one_kernel(tmp_path, pages):
    same = dict(epochs=1, fine_tune_epochs=1, model='lenet300', grid=dict(seed=[0]), n_train=200, out=str(tmp_path))
    cases = [dict(same, methods=['magnitude', 'random'], sizes=[.5, .2]),
             dict(same, methods={'neurons': dict(method='magnitude', unit='channel')}, sizes=None)]
    shown = pages(page_path('comparison'), cases)
    assert 'points' in shown[0] or 'PR' in shown[0]
    done = list(tmp_path.glob('study-*/rows.csv'))
    assert len(done) == 1 and set(pd.read_csv(done[0]).name) == {'magnitude', 'random'} and 'neurons' in shown[1]

@pytest.mark.slow
def test_a_failing_page_says_what_is_wrong(tmp_path):
    with pytest.raises(pm.exceptions.PapermillExecutionError, match="did you mean 'method'"):
        pm.execute_notebook(str(page_path()), str(tmp_path/'x.ipynb'), dict(metod='random'), kernel_name='python3',
                            progress_bar=False)
