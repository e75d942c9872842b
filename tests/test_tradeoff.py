"""Tables, curves and files of trade-offs: against brute force, by hand, and against the rows they were made of."""
import json
from itertools import product
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from neuronprune import tradeoff as T
from neuronprune.data import get_dls
from neuronprune.models import build
from neuronprune.pipeline import prune
from neuronprune.tradeoff import *
from neuronprune.train import fit, learner

def curve(seed, points, dense_k=900, n=1000, name='x', **kw):
    about = dict(dataset='d', model='m', unit='weight', start='previous', rewind='none', name=name, seed=seed,
                 pruned_k=0, **kw)
    return pd.DataFrame([dict(about, step=i, density=d, dense_k=dense_k, dense_n=n, dense_accuracy=dense_k/n, tuned_k=k,
                              tuned_accuracy=k/n, params_density=d, macs_density=d/2) for i,(d,k) in enumerate(points)])

@pytest.mark.filterwarnings('ignore:df. chains that stopped')
@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(1, 99), st.integers(850, 950)), min_size=1, max_size=6,
                         unique_by=lambda o: o[0]), min_size=1, max_size=4), st.sampled_from(LEVELS))
def test_commensurate_by_brute_force(nets, level):
    df = pd.concat([curve(s, [(d/100, k) for d,k in ps]) for s,ps in enumerate(nets)])
    best = []
    for ps in nets:
        ok = [d for d,k in ps if 1000-k <= 100 + 10*level]
        best.append(1-min(ok)/100 if ok else 0.)
    r, best, close = commensurate(df, level).iloc[0], np.array(best), lambda v: pytest.approx(100*v, abs=1e-9)
    assert r.PR_mean == close(best.mean()) and r.reached == sum(best > 0) and r.nets == len(nets)
    assert (r.PR, r.PR_lo, r.PR_hi) == tuple(map(close, (np.median(best), best.min(), best.max())))
    assert r.complete == sum(len(ps) == max(map(len, nets)) for ps in nets)
    assert r.FR_mean == close(np.mean([(1+b)/2 if b else 0 for b in best]))
    assert 0 <= r.PR_lo <= r.PR <= r.PR_hi <= 100 and 0 <= r.FR_lo <= r.FR <= r.FR_hi <= 100

def test_commensurate_by_hand():
    df = curve(0, [(.5, 899), (.3, 890), (.2, 895), (.1, 880)])
    t = commensurate(df, (0, .1, .5, 1, 2, 5)); fallback = t.iloc[0]
    assert t.PR.tolist() == pytest.approx([0, 50, 80, 80, 90, 90])
    assert t.error.tolist() == pytest.approx([10, 10.1, 10.5, 10.5, 12, 12])
    assert fallback.reached == 0 and (fallback.PR, fallback.FR) == (0, 0)
    assert commensurate(curve(0, [(.5, 9949)], 9999, 10000), .5).PR[0] == 50, 'exactly on the level'
    assert commensurate(curve(0, [(.5, 9948)], 9999, 10000), .5).PR[0] == 0
    in_decimals = commensurate(curve(0, [(.5, 9942)], 9999, 10000), .57)
    assert in_decimals.PR[0] == 50, '.57 of 10,000 is less than 5,700 in binary'
    two = commensurate(pd.concat([df, curve(0, [(.4, 900)], name='y')]), 0)
    assert two.name.tolist() == ['x', 'y'] and two.PR.tolist() == pytest.approx([0, 60])
    assert commensurate(df).level.tolist() == list(LEVELS)

def test_rows_may_carry_any_index():
    late = curve(0, [(.15, 897), (.1, 896)]).assign(step=[2, 3])
    df = pd.concat([curve(0, [(.5, 899), (.3, 898)]), late]) # every label of the index twice
    assert commensurate(df, .5).PR[0] == pytest.approx(90) and commensurate(df, .35).PR[0] == pytest.approx(85)
    assert len(plot_tradeoff(df).axes[0].lines[0].get_xdata()) == 4

FAILED = dict(dataset='d', model='m', name='x', seed=1, error='RuntimeError: full')

@pytest.mark.parametrize('failed', [None, FAILED, dict(FAILED, unit='weight', start='previous', rewind='none')])
def test_chains_that_stopped_are_named(failed):
    whole, short = curve(0, [(.5, 900), (.3, 895), (.1, 890)]), curve(1, [(.5, 900), (.3, 900)])
    tables = [pd.concat([whole, short])]
    full = pd.concat([whole, curve(1, [(.5, 900), (.3, 900), (.1, 900)])])
    if failed: tables += [pd.concat([o, pd.DataFrame([failed])]) for o in (tables[0], full)]
    for df in tables:
        with pytest.warns(UserWarning, match='stopped early: x .seed 1.;'): t = commensurate(df, 1)
        assert (t.nets[0], t.complete[0], t.reached[0]) == (2, 1, 2)
    with pytest.warns(UserWarning, match='stopped early'): ax = plot_tradeoff(tables[0]).axes[0]
    line, = [o for o in ax.lines if o.get_label() == 'x, stopped early']
    assert list(line.get_xdata()) == [.5, .3] and list(line.get_ydata()) == pytest.approx([0, -.25])

def test_a_chain_without_a_row_is_named_and_harms_no_other():
    df = pd.concat([curve(0, [(.5, 900)]), pd.DataFrame([dict(FAILED, name='boom')]), curve(1, [(.5, 900)], name='y')])
    with pytest.warns(UserWarning, match='stopped early: boom .seed 1.;'): t = commensurate(df, 1)
    assert t.name.tolist() == ['x', 'y'] and t.complete.tolist() == [1, 1]

def test_tables_refuse_what_they_cannot_use():
    one = curve(0, [(.5, 900)])
    with pytest.raises(TypeError, match='df'): commensurate([1])
    with pytest.raises(ValueError, match='no column'): commensurate(pd.DataFrame(dict(name=['x'])))
    with pytest.raises(ValueError, match='when'): commensurate(one, when='before')
    twice = pd.concat([one, curve(0, [(.4, 900)])])
    with pytest.raises(ValueError, match="'x', seed 0 has a step twice"): commensurate(twice)
    with pytest.raises(ValueError, match='no los in any row'): plot_tradeoff(one, y='los')
    with pytest.raises(ValueError, match='no top5 in any row'): plot_tradeoff(one, y='top5')
    with pytest.raises(ValueError, match="did you mean 'macs'"): plot_tradeoff(one, 'mac')

@pytest.mark.parametrize('key,value', [('unit', 'channel'), ('start', 'dense'), ('rewind', 'init'), ('dataset', 'e'),
                                       ('model', 'n')])
def test_chains_of_one_name_are_told_apart(key, value):
    df = pd.concat([curve(0, [(.5, 900)]), curve(0, [(.4, 900)]).assign(**{key:value})])
    assert commensurate(df, 0).PR.tolist() == pytest.approx([50, 60])
    assert {o.get_label() for o in plot_tradeoff(df).axes[0].lines[:2]} == {f'x, {df[key].iloc[0]}', f'x, {value}'}

def test_rewinding_is_read_from_a_record():
    one = curve(0, [(.5, 900)]).drop(columns='rewind')
    df = pd.concat([one.assign(extra=json.dumps(dict(rewind=r))) for r in ('none', 'init')])
    assert commensurate(df, 0).rewind.tolist() == ['none', 'init']

def test_without_counts_the_axis_says_what_is_lost():
    none = dict(dense_k=None, tuned_k=None, tuned_accuracy=None, dense_accuracy=None)
    df = curve(0, [(.5, 0), (.2, 0)]).assign(**none, dense_loss=.2, tuned_loss=[.3, .5], dense_metrics='{"mae": 1}',
                                             tuned_metrics=['{"mae": 2}', '{"mae": 4}'])
    for y,label,values in [(None, 'loss − dense', [.1, .3]), ('mae', 'mae − dense', [1, 3])]:
        ax = plot_tradeoff(df, y=y).axes[0]
        assert ax.get_ylabel() == label and list(ax.lines[0].get_ydata()) == pytest.approx(values)
    with pytest.raises(ValueError, match='no accuracy in any row'): commensurate(df)

def test_a_method_has_one_colour_in_every_plot():
    a, b = curve(0, [(.5, 900)], name='random'), curve(0, [(.5, 890)], name='magnitude')
    colour = lambda df: next(o for o in plot_tradeoff(df).axes[0].lines if o.get_label() == 'magnitude').get_color()
    assert colour(b) == colour(pd.concat([a, b])) == colour(pd.concat([b, a]))

def test_only_what_varies_and_only_other_plots():
    df = pd.DataFrame(dict(name=['x', 'x'], a=[1, 1], b=[1, 2], c=[None, None]))
    assert list(varying(df)) == ['name', 'b'] and list(varying(df[:1])) == ['name', 'a', 'b', 'c']
    same = curve(0, [(.5, 900)]).assign(macs_density=.501)
    assert tradeoff_axes(same) == ['params'] and tradeoff_axes(curve(0, [(.5, 900)])) == ['params', 'macs']

# Rows of real chains

@pytest.fixture(scope='module')
def rows():
    dls = get_dls('digits', n_train=320)
    def chain(seed, name, **kw):
        learn = fit(learner(build('lenet300', dls.c_in, dls.n_out, dls.size, seed=seed), dls), 2, lr=.1, seed=seed)
        got = prune(learn, 'magnitude', sizes=[.5, .2, .1], fine_tune_epochs=1, lr=.1, seed=seed, latency=False, **kw)
        return got.rows.assign(name=name, error='')
    runs = [('WT', {}), ('FT', dict(unit='channel'))]
    return pd.concat([chain(s, n, **kw) for s in (0, 1) for n,kw in runs], ignore_index=True)

def test_results_on_disk(rows, tmp_path):
    df = rows; files = {f.name: f for f in save_results(df, tmp_path/'res')}
    plots = {f'{k}_{x}.pdf' for k in ('tradeoff', 'loss', 'top5') for x in tradeoff_axes(df)}
    expected = {'rows.csv', 'commensurate.csv', 'results.npz', 'budget.pdf', *plots}
    assert set(files) == {o.name for o in (tmp_path/'res').iterdir()} == expected
    with np.load(files['results.npz']) as z: a = dict(z)
    assert a['names'].tolist() == ['WT', 'FT'] and a['nets'].tolist() == [0, 1]
    assert a['error'].shape == (2, 3, 1, 2) and a['samples_per_layer'].shape == (2, 3, 1, 2, 3)
    for s,i,(j,n) in product((0, 1), range(3), enumerate(['WT', 'FT'])):
        r, at = df[(df.seed == s) & (df.step == i) & (df.name == n)].iloc[0], (s, i, 0, j)
        assert ((a['error'][at], a['sizes'][at], a['flops'][at])
                == (1-r.tuned_accuracy, r.params_nonzero, r.macs_nonzero))
        assert a['samples_per_layer'][at].tolist() == list(json.loads(r.layers).values())
        assert a['error5'][at] == 1-r.tuned_top5 and a['error5_dense'][at] == 1-r.dense_top5 and r.tuned_k5 >= r.tuned_k
        assert a['curves'][at].tolist() == list(json.loads(r.curve).values())
    table = commensurate(df)
    assert a['commensurate_PR'].tolist() == pytest.approx((table.PR_mean/100).tolist())
    assert a['commensurate_error'].tolist() == pytest.approx((table.error/100).tolist())
    for k in ('name', 'unit', 'level', 'nets', 'reached'): assert a[f'commensurate_{k}'].tolist() == table[k].tolist()
    back = pd.read_csv(files['rows.csv'])
    pd.testing.assert_frame_equal(commensurate(back), table)
    assert back.tuned_k.tolist() == df.tuned_k.tolist() and back.layers.tolist() == df.layers.tolist()
    assert all(files[f].read_bytes().startswith(b'%PDF') for f in files if f.endswith('pdf'))
    with pytest.raises(ValueError, match='2 values of start'): results_arrays(pd.concat([df, df.assign(start='dense')]))

def test_every_method_has_its_own_rewinding(rows):
    "As in a study of SNIP, which rewinds, and magnitude, which does not."
    df, ways = rows, ['none', 'init']
    own = df.assign(rewind=df['name'].map({n:ways[i % 2] for i,n in enumerate(dict.fromkeys(df['name']))}))
    a, b = results_arrays(df), results_arrays(own)
    assert own.rewind.nunique() == 2 and all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == 'f') for k in a
                                             if isinstance(a[k], np.ndarray))

def test_files_without_counts_or_training(rows, tmp_path):
    gone = {f'{w}_{k}':None for w in ('dense', 'pruned', 'tuned') for k in ('k', 'accuracy', 'k5', 'top5')}
    files = [o.name for o in save_results(rows.assign(**gone), tmp_path/'loss')]
    assert 'results.npz' not in files and 'tradeoff_params.pdf' not in files and 'loss_params.pdf' in files
    cut = rows.assign(curve='{}', **{f'tuned_{k}':None for k in ('k', 'n', 'accuracy', 'k5', 'top5', 'loss')})
    assert results_arrays(cut)['curves'].shape == (2, 3, 1, 2, 3, 0)
    assert 'results.npz' in [o.name for o in save_results(cut, tmp_path/'cut')]

def test_plots_show_the_rows(rows):
    df, ft = rows, rows[rows.name == 'FT'].groupby('step')
    def line(**kw): return next(o for o in plot_tradeoff(df, **kw).axes[0].lines if o.get_label() == 'FT')
    assert np.allclose(line().get_xdata(), ft.params_density.mean())
    assert np.allclose(line().get_ydata(), 100*(ft.tuned_accuracy.mean() - ft.dense_accuracy.mean()))
    ax = plot_tradeoff(df).axes[0]
    assert ax.get_xlim()[0] > ax.get_xlim()[1] and ax.get_xscale() == 'log'
    assert np.allclose(line(y='loss').get_ydata(), ft.tuned_loss.mean() - ft.dense_loss.mean())
    assert np.allclose(line(y='top5').get_ydata(), 100*(ft.tuned_top5.mean() - ft.dense_top5.mean()))
    near, table, names = T._layer_table(T._labelled(T._keyed(df)), .21)
    assert near == .2 and names == ['fc1', 'fc2', 'fc3']
    row = df[(df.name == 'WT') & (df.step == 1)]; left = np.mean([list(json.loads(o).values()) for o in row.layers], 0)
    assert np.allclose(table['WT'][:, 0], left/row.weights.mean())
    assert np.allclose(table['WT'][:, 1], left/np.array([19200, 30000, 1000])/(row.weights.mean()/50200))
    assert len(plot_budget(df, .2).axes) == 2
