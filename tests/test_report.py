"""The record: counts by hand, memory identities, round trip, comparisons, published figures."""
import copy, json, math
from types import SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pytest, scipy.sparse, torch
from torch import nn
from neuronprune.shown import colours
from neuronprune.masks import Mask, Scores
from neuronprune.report import Report, compare, differs, plot_compare, published, verdict
from neuronprune.costs import (accounting, count_macs, count_params, hardware, latency_ms, memory, metered,
                               nonzero_params, versions)
from neuronprune.surgery import factorise
from neuronprune.evaluation import Evaluation

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*3*3, 5))
XB = torch.randn(6, 3, 7, 7)

@pytest.mark.parametrize('m,shape,macs', [(nn.Linear(7, 5), (7,), 35), (nn.Conv2d(3, 8, 3), (3, 9, 9), 8*27*49),
                                          (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 6, 6), 8*2*9*36),
    (nn.Conv2d(3, 4, (3, 1), stride=2, dilation=2), (3, 11, 6), 4*3*3*4*3), (nn.Conv1d(2, 6, 5), (2, 12), 6*2*5*8),
                                          (nn.Conv3d(1, 2, 2), (1, 4, 4, 4), 2*8*27)])
def test_macs_of_known_layers(m, shape, macs):
    x = torch.randn(3, *shape)
    assert count_macs(m, x) == macs == count_macs(m, x, nonzero=True)
    with torch.no_grad(): m.weight[0] = 0
    assert count_macs(m, x, nonzero=True) == macs - macs//m.weight.shape[0]
    assert count_macs(m, x) == macs

class Fed(nn.Module):
    "An attention or recurrent module and what it is called with, behind one input."
    def __init__(self, m, call): super().__init__(); self.m, self.call, self.out = m, call, nn.Linear(4, 2)
    def forward(self, x): return self.call(self.m, x)

@pytest.mark.parametrize('need', [True, False])
@pytest.mark.parametrize('mask', [None, torch.zeros(5, 5)])
def test_macs_of_attention(need, mask):
    "Four projections, q·k and the weights times v, whichever kernel runs."
    m = Fed(nn.MultiheadAttention(8, 2, batch_first=True),
            lambda m, x: m(x, x, x, need_weights=need, attn_mask=mask)[0])
    assert count_macs(m, torch.rand(3, 5, 8)) == 5*4*8*8 + 2*5*5*(4+4)

@pytest.mark.parametrize('kv', [4, 2, 1])
def test_macs_of_attention_with_shared_keys(kv):
    def call(m, x):
        q, k, v = (x[:, None, :, :3].expand(-1, n, -1, -1).contiguous() for n in (4, kv, kv))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert count_macs(Fed(None, call), torch.rand(3, 5, 8)) == 4*5*5*(3+3)

@pytest.mark.parametrize('cls,gates', [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_macs_of_recurrent_layers(cls, gates):
    m = Fed(cls(8, 4, 2, batch_first=True), lambda m, x: m(x)[0])
    assert count_macs(m, torch.rand(3, 5, 8)) == 5*gates*4*(8+4 + 4+4)

def test_macs_leave_the_model():
    m = net(); before = copy.deepcopy(m.state_dict()); m[1].eval()
    assert count_macs(m, XB) == 8*27*9 + 72*5
    assert m.training and not m[1].training and all(not o._forward_hooks for o in m.modules())
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    with pytest.raises(ValueError, match='empty'): count_macs(m, XB[:0])

def test_params():
    m = net()
    assert count_params(m) == 8*27+8 + 16 + 72*5+5
    nn.init.zeros_(m[4].bias); nn.init.zeros_(m[1].bias)
    assert nonzero_params(m) == count_params(m) - 5 - 8

def test_memory_is_the_size_of_scipys_files(tmp_path):
    m = nn.Sequential(nn.Linear(500, 300), nn.Conv2d(2, 4, 3)); torch.manual_seed(0)
    for how, compressed in (('csr_npz', True), ('csr', False)):
        size = 0
        for i, w in enumerate((m[0].weight, m[1].weight)):
            f = tmp_path/f'{how}{i}.npz'
            scipy.sparse.save_npz(f, scipy.sparse.csr_matrix(w.detach().reshape(len(w), -1).numpy()),
                                  compressed=compressed)
            size += f.stat().st_size
        assert memory(m, how) == size/2**20
    assert memory(m, 'dense') == (500*300 + 4*18)*4/2**20
    fc2 = nn.Linear(500, 300)
    assert (memory(fc2, 'dense') == pytest.approx(.5722, abs=1e-4)
            and memory(fc2, 'csr') == pytest.approx(1.147, abs=1e-3) and memory(fc2) == pytest.approx(.537, abs=.005))
    with torch.no_grad(): fc2.weight[torch.rand(300, 500) < .95] = 0
    assert memory(fc2) < .1*.537
    with pytest.raises(ValueError, match="'csr_npz'"): memory(m, 'npz')

def test_retained_percentages_of_mint():
    "Parameters pruned of the whole network from the share retained in the masked layers, as published."
    for kept, masked, total, pruned in ((15.035583, 14_712_832, 14_977_728, 83.46),
                                        (43.363957, 785_664, 848_944, 52.41), (53.2144, 23_445_504, 25_502_912, 43.01),
                                        (46.6939, 23_445_504, 25_502_912, 49.00),
                                        (46.0200, 23_445_504, 25_502_912, 49.62)):
        assert 100*masked*(1-kept/100)/total == pytest.approx(pruned, abs=.011)

def test_accounting_by_hand(tmp_path):
    m = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    before = copy.deepcopy(m.state_dict())
    with torch.no_grad(): m[5].weight[0] = before['5.weight'][0] = 0
    mask = Mask({'0': torch.rand(4, 2, 3, 3) < .5, '3': torch.rand(6, 16) < .25}, 'weight'); t = accounting(m, mask)
    zeros = [int((~v).sum()) for v in mask.values()]
    assert (list(t.index) == ['0', '3', 'masked layers', 'network'] and t.weights.tolist() == [72, 96, 168, 186]
            and t.zeros.tolist() == [*zeros, sum(zeros), sum(zeros)])
    assert t.pruned.tolist() == [z/w for z,w in zip(t.zeros, t.weights)], (
        'a weight that happens to be zero was not pruned')
    cut = copy.deepcopy(m)
    with torch.no_grad():
        for k,v in mask.expand(cut).items(): cut.get_parameter(k).mul_(v)
    for how in ('dense', 'csr', 'csr_npz'):
        assert (t[how]['network'] == pytest.approx(memory(cut, how), rel=1e-12) and t[how]['0'] == memory(cut[0], how)
                and t[how]['masked layers'] == pytest.approx(memory(cut[0], how)+memory(cut[3], how)))
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    with pytest.raises(TypeError, match='mask'): accounting(m, None)

def test_accounting_of_ranks():
    "Factors instead of zeros; the third layer's would not pay, so nothing is gone there."
    m = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 3))
    mask = Mask({'0': torch.arange(8) < 2, '2': torch.tensor([[True]+[False]*15]*2), '3': torch.arange(3) < 2}, 'rank')
    t, small = accounting(m, mask), factorise(m, mask)
    assert (t.weights.tolist() == [144, 512, 48, 704, 704]
            and t.zeros.tolist() == [144-2*(8+18), 512-(32+2*16), 48-2*19, 144-52+512-64+10, 144-52+512-64+10])
    for how in ('dense', 'csr', 'csr_npz'):
        assert (t[how]['network'] == pytest.approx(memory(small, how), rel=1e-12)
                and t[how]['2'] == pytest.approx(memory(small[2], how)))
    few = accounting(m, Mask({'3': torch.tensor([True, True, True])}, 'rank'))
    assert few.zeros.tolist() == [0, 0, 0] and few.weights.tolist() == [48, 48, 704]

def report(**kw):
    dense = net(); masked = copy.deepcopy(dense)
    with torch.no_grad(): masked[4].weight[:, ::2] = 0
    mask = Mask({'4': masked[4].weight != 0}, 'weight')
    return Report.measure(dense, masked, xb=XB, mask=mask,
                          scores=Scores({'4': torch.ones(5, 72)}, 'weight', method='toy', secs=.5),
                          before=Evaluation(90, 100, .3), pruned=Evaluation(50, 100), tuned=Evaluation(88, 100, .4),
                          seed=1, sparsity=.5, **kw)

def test_measure_counts():
    r = report(latency=False)
    n = 8*27+8+16+72*5+5; zero_bn = 8
    assert (r.method, r.unit, r.units_removed, r.weights_removed) == ('toy', 'weight', .5, .5)
    assert (r.params_before, r.params_after, r.nonzero_after) == (n, n, n-180-zero_bn)
    assert r.params_removed == pytest.approx(180/(n-zero_bn)) and r.compression == n/(n-180-zero_bn)
    assert (r.macs_before, r.macs_after, r.macs_nonzero) == (8*27*9+360, 8*27*9+360, 8*27*9+180)
    assert r.latency_before is None and r.secs == .5 and r.final == Evaluation(88, 100, .4)
    with pytest.raises(TypeError, match='unknown field'): report(accuracy=1)

def test_shrunk_counts_as_stored():
    dense, small = net(), nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                                        nn.Linear(36, 5))
    mask = Mask({'0': torch.arange(8) < 4}, 'channel')
    r = Report.measure(dense, dense, small, xb=XB, mask=mask)
    assert (r.params_after == count_params(small) and r.macs_after == 4*27*9 + 180 and r.units_removed == .5
            and r.weights_removed == .5)
    assert r.latency_after > 0 and r.latency_batch == 6

def test_round_trip(tmp_path):
    r = report(method_args=dict(a=1, b=(1, 2), c=None), extra=dict(x='ü'))
    r.method_args['b'] = [1, 2]
    r.save(tmp_path/'deep'/'r.json')
    assert Report.load(tmp_path/'deep'/'r.json') == r
    assert [o.name for o in (tmp_path/'deep').iterdir()] == ['r.json']
    json.loads((tmp_path/'deep'/'r.json').read_text(), parse_constant=lambda c: pytest.fail(c))
    odd = Report(extra=dict(t=torch.ones(2), n=np.float32(1), nan=math.nan, p=tmp_path))
    odd.save(tmp_path/'odd.json')
    assert Report.load(tmp_path/'odd.json').extra == dict(t=[1., 1.], n=1., nan=None, p=str(tmp_path))
    for text in ('[]', '{"a": 1}', 'no'):
        (tmp_path/'bad.json').write_text(text)
        with pytest.raises(ValueError, match='Report.save'): Report.load(tmp_path/'bad.json')

def test_row_is_flat_and_jsonable():
    row = report().row(); json.dumps(row, allow_nan=False)
    assert all(not isinstance(v, dict) for v in row.values())
    assert (row['tuned_k'] == 88 and row['tuned_lo'] < .88 < row['tuned_hi']
            and json.loads(row['memory_after'])['csr_npz'] > 0)
    json.dumps(Report().row(), allow_nan=False)

def test_a_record_shows_ten_lines_and_folds_the_rest():
    r = report(); r.secs, r.latency_before, r.latency_after, r.latency_batch = .5, 2., 1., 8
    r.model, r.dataset = 'mlp', 'digits'
    top, rest = r._repr_html_().split('<details>')
    assert top.count('<tr>') <= 10
    for o in ('>network, data<', '2.000 → 1.000 ms, batch of 8', '88/100', '0.5 s'): assert o in top
    assert rest.endswith('</details>') and 'versions' not in top and '88/100' not in rest
    shown = {k for k in ('method', 'model', 'dataset') if k in r.to_frame().loc['run'].index}
    assert shown == {'method', 'model', 'dataset'} and len(r.to_frame()) > top.count('<tr>')
    assert f'{rest.count("<tr>")} further lines' in rest

def test_a_record_of_no_classification_shows_its_metrics():
    long = {f'a_metric_of_its_own_{i}':i/7 for i in range(6)}
    r = Report(method='mint', before=Evaluation(loss=.5, metrics=long), pruned=Evaluation(loss=.7, metrics=long))
    top = r._repr_html_().split('<details>')[0]
    for o in ('loss, metrics before', 'loss, metrics after pruning', 'a_metric_of_its_own_5 0.7143'): assert o in top
    assert 'accuracy' not in top

def test_rows_and_lines_have_the_name_or_the_method():
    rs = [
        Report(method='mint', name='ours', params_removed=.5, params_before=10, nonzero_after=5,
               pruned=Evaluation(8, 10)), Report(method='mint', params_removed=.25, pruned=Evaluation(7, 10))]
    df = compare(rs)
    assert df.name.tolist() == ['ours', 'mint'] and df['parameters removed, %'].tolist() == [50, 25] and df[
        'MACs removed, %'].isna().all()
    ax = plot_compare(rs).axes[0]
    assert ax.get_legend_handles_labels()[1] == ['ours', 'mint'] and ax.get_xlabel() == 'parameters removed, %'
    assert [o[0].get_xdata().tolist() for o in ax.containers] == [[50], [25]] and ax.containers[1][0].get_color(
        ) == colours(['mint'])['mint']
    assert plot_compare(rs, 'compression').axes[0].get_xlabel() == 'compression'

def test_tables_and_plots():
    r, empty = report(), Report(method='none')
    assert 'after fine-tuning' in r._repr_html_() and '88/100' in repr(r)
    empty._repr_html_(); repr(empty)
    df = compare([r, empty])
    assert (df['fine-tuned'][0].startswith('88/100 = 88.0 % [')
            and df['against before'].tolist() == ['no difference', '–'])
    plot_compare([r, empty])
    with pytest.raises(ValueError, match='reports'): compare([])
    with pytest.raises(TypeError, match='Report, or what prune returns'): compare([r, 5])
    with pytest.raises(ValueError, match='x='): plot_compare([r], 'size')

def test_results_are_compared_by_their_records():
    rs = [report(name='a'), report(name='b')]; res = [SimpleNamespace(report=o) for o in rs]
    assert compare(res).equals(compare(rs)) and compare([res[0], rs[1]]).equals(compare(rs))
    at = lambda fig: [o[0].get_xydata().tolist() for o in fig.axes[0].containers]
    assert at(plot_compare(res)) == at(plot_compare(rs))

def test_a_figure_of_the_users_stays_open():
    fig, (a, b) = plt.subplots(1, 2)
    assert plot_compare([report()], ax=a) is fig and a.containers and not b.containers
    assert fig.number in plt.get_fignums()
    assert plot_compare([report()]).number not in plt.get_fignums()
    plt.close(fig)

def test_differs():
    a, b = Evaluation(175, 180), Evaluation(177, 180)
    assert not differs(a, b) and verdict(a, b) == 'no difference'
    lo, hi = Evaluation(600, 1000), Evaluation(900, 1000)
    assert differs(lo, hi) and differs(hi, lo) and verdict(lo, hi) == 'lower' and verdict(hi, lo) == 'higher'

def test_cost_and_machine():
    with metered() as m: torch.ones(2**22)
    assert m.secs > 0 and (m.peak_mib is None or m.peak_mib >= 0)
    assert hardware()['cpu'] and versions()['torch'] == torch.__version__
    with pytest.raises(TypeError): latency_ms(net(), XB, n=1.5)

def test_published_figures():
    df = published()
    assert (set(df.system) == {'mint', 'provable', 'energy', 'anneal'} and df.verified.all()
            and df.source.str.len().min() > 10)
    for c in ('params_removed', 'accuracy'): assert df[c].dropna().between(0, 1).all()
    vgg = published('mint').query("model == 'vgg16' and method == 'MINT'").iloc[0]
    assert (vgg.params_removed, vgg.accuracy, vgg.memory_mib) == (.8346, .9343, 9.020)
    assert not df.method.str.startswith(('PFP', 'SiPP', 'OAMIP')).any()
    with pytest.raises(ValueError, match='system'): published('pfp')

def test_bounds_stand_in_the_record(tmp_path):
    r = Report(method='sipp', bounds={'fc1': dict(bound=1.25, measured=.2, verdict='vacuous: it certifies nothing')},
               extra=dict(rounds=1))
    assert r.to_frame().loc[('error of a layer’s sums', 'fc1'), 'value'] == ('bound 1.25, measured 0.2; vacuous: '
                                                                             'it certifies nothing')
    r.save(tmp_path/'r.json'); assert Report.load(tmp_path/'r.json').bounds == r.bounds
    assert 'error of a layer’s sums' not in Report(method='snip').to_frame().index.get_level_values(0)
