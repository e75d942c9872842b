"""Networks, loaders and learners that others made: batches in the place of loaders, PyTorch without fastai,
fastai's own learners."""
import copy, warnings
from dataclasses import dataclass
import numpy as np, pandas as pd, pytest, torch
from functools import partial
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from torchvision.models import VisionTransformer
from fastai.metrics import accuracy, accuracy_multi, Dice, mae, rmse
from fastai.torch_core import TensorBase
from neuronprune.all import *
from neuronprune.core import mapped, methods
from neuronprune.data import OneBatch
from neuronprune.graph import trace
from neuronprune.report import Report, compare, plot_compare
from neuronprune.surgery import difference, load
from neuronprune.train import Evaluation, as_learner

SCORES = [k for k,m in methods().items() if m.kind == 'score']
STARTS = ('magsign', 'mag_increase', 'movement') # what needs the initial weights

@pytest.fixture(autouse=True)
def _seeded(): torch.manual_seed(0)

def net(n_out=3, n_in=12):
    return nn.Sequential(nn.Linear(n_in, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16),
                         nn.ReLU(), nn.Linear(16, n_out))

class Two(nn.Module):
    "A network of two inputs."
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(12, 16), nn.Linear(4, 16), nn.Linear(16, 3)
    def forward(self, u, v): return self.c((self.a(u)+self.b(v)).relu())

X, V, Y = torch.randn(60, 12), torch.randn(60, 4), torch.arange(60) % 3
R = X.sum(1, keepdim=True)
def loader(*t, bs=16, **kw): return DataLoader(TensorDataset(*t), batch_size=bs, **kw)
def quiet(f, *args, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return f(*args, **kw)

# ---- a batch in the place of loaders

@pytest.mark.parametrize('name', SCORES)
def test_every_method_takes_a_batch(name):
    m, model = methods()[name], net().eval()
    before = copy.deepcopy(model.state_dict())
    s = quiet(m, model, batch=(X, Y), **(dict(init=model.state_dict()) if name in STARTS else {}))
    assert len(s) and all(torch.isfinite(v).all() for v in s.values())
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    if 'data' in m.needs: assert s.meta['n'] == len(X) and s.meta['split'] == 'batch' # all of it

# mip: one tensor; slimming: batch norms
@pytest.mark.parametrize('name', [k for k in SCORES if k not in ('mip', 'slimming', *STARTS)])
@pytest.mark.parametrize('form', [lambda u, v: (u, v), lambda u, v: [u, v], lambda u, v: dict(v=v, u=u)])
def test_inputs_of_any_form(name, form):
    model, m = Two(), methods()[name]
    a, b = (quiet(m, model, batch=(f(X, V), Y), seed=1) for f in (form, lambda u, v: (u, v)))
    assert len(a) and all(torch.allclose(v, b[k]) for k,v in a.items())

def test_a_batch_is_what_loaders_of_it_give():
    model = net(); xb, yb = X[:60], Y[:60]
    a, b = methods()['taylor'](model, batch=(xb, yb)), methods()['taylor'](model, DataLoaders(*[[(xb, yb)]]*2), n=60)
    assert all(torch.allclose(v, b[k], rtol=1e-4) for k,v in a.items())

@pytest.mark.parametrize('name', ['snip', 'taylor', 'pfp', 'mint', 'thinet', 'pca', 'magnitude'])
@pytest.mark.parametrize('batch,kind,said', [
    (X, TypeError, r'batch: expected a pair \(xb, yb\), got Tensor'),
    ((X, Y, Y), TypeError, r'batch: expected a pair \(xb, yb\), got tuple of 3'),
    ((X, None), TypeError, 'batch: yb: expected a Tensor, got NoneType'),
    ((X, Y[:5]), ValueError, 'batch: yb: 5 labels for 60 inputs'),
    (((X, V[:7]), Y), ValueError, 'batch: tensors of 7, 60 examples'),
    ((X, R), ValueError, r'batch: yb: shape \(60, 1\)'),
    ((X, Y.float()), ValueError, 'batch: yb: dtype torch.float32; expected integer'),
    ((X[:0], Y[:0]), ValueError, 'batch: xb: the batch is empty'),
    (('a', Y), TypeError, 'batch: xb: expected a Tensor')])
def test_what_is_wrong_with_a_batch(name, batch, kind, said):
    with pytest.raises(kind, match=said): methods()[name](net(), batch=batch)

@pytest.mark.parametrize('kw,said', [(dict(dls=OneBatch((X, Y))), 'batch, dls: a OneBatch'), (dict(n=5), 'batch, n=5'),
                                     (dict(n_per_class=5), 'batch, n_per_class=5'),
                                     (dict(split='valid'), "batch, split='valid'")])
def test_a_batch_beside_what_chooses_images(kw, said):
    with pytest.raises(ValueError, match=said): methods()['taylor'](net(), batch=(X, Y), **kw)
    with pytest.raises(ValueError, match='batch, dls'): methods()['mip'](net(), OneBatch((X, Y)), batch=(X, Y))
    with pytest.raises(ValueError, match='batch, dls'): methods()['taylor'](net(), OneBatch((X, Y)), batch=(X, Y))

@pytest.mark.parametrize('name', ['snip', 'taylor'])
def test_a_loss_of_ones_own_takes_its_own_labels(name):
    s = methods()[name](net(1), batch=(X, R), loss_func=nn.MSELoss()); assert len(s) and s.meta['n'] == 60

@pytest.mark.parametrize('name', ['pca', 'pfp', 'sipp', 'mint', 'thinet'])
def test_what_needs_no_classes_draws_from_any_targets(name):
    dls = DataLoaders(*[loader(X, R)]*2)
    kw = {} if name == 'mint' else dict(n=40)
    assert quiet(methods()[name], net(1), dls, **kw).meta['n'] == (60 if name == 'mint' else 40)

def test_class_numbers_in_a_column():
    dls = DataLoaders(*[loader(X, Y[:,None].to(torch.int8))]*2)
    assert calib_batch(dls, 5)[1].tolist() == [0, 1, 2]*5

# ---- PyTorch without fastai

def test_as_learner_guesses_the_loss():
    assert isinstance(as_learner(net(), loader(X, Y), loader(X, Y)).loss_func, CrossEntropyLossFlat)
    for y in (R, R[:,0]): assert type(as_learner(net(1), loader(X, y), loader(X, y)).loss_func.func) is nn.MSELoss
    maps = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)); x = torch.rand(8, 1, 6, 6)
    assert isinstance(as_learner(maps, *[[(x, (x[:,0] > .5).long())]]*2).loss_func, nn.CrossEntropyLoss)

@pytest.mark.parametrize('n_out,y', [(1, (R > 0).float()), (3, torch.eye(3)[Y]), (1, Y), (3, R), (3, Y > 0)])
def test_a_loss_that_cannot_be_guessed_is_asked_for(n_out, y):
    with pytest.raises(ValueError, match='loss_func=None: .*BCEWithLogitsLoss.*cannot be guessed.*as_learner'):
        as_learner(net(n_out), *[loader(X, y)]*2)

def test_a_binary_loss_that_is_given():
    y = (R > 0).float()
    learn = as_learner(net(1), *[loader(X, y)]*2, loss_func=nn.BCEWithLogitsLoss(), lr=.05,
                       metrics=partial(accuracy_multi, thresh=.5))
    r = prune(learn, 'magnitude', .5, fine_tune_epochs=2).report
    assert r.tuned.k is None and r.tuned.n == 60 and 'accuracy_multi' in r.tuned.metrics and r.tuned.loss > 0

@pytest.mark.parametrize('train,kind,said', [
    (loader(X), ValueError, 'train: a batch is a list'), (5, TypeError, 'train: expected a loader'),
    (X, TypeError, 'train: .*got Tensor'),
    ((X, Y), TypeError, 'train: .*one batch; wrap it in a list'), ([], ValueError, 'train: no batches'),
    ([dict(x=X, y=Y)], ValueError, "train: a batch is a dict with 'x', 'y'"),
    (iter(loader(X, Y)), TypeError, 'train: expected a loader'),
    (loader(V, Y), ValueError, 'train: the model cannot digest'),
    (loader(X, Y, bs=99, drop_last=True), ValueError, 'train: no batches'),
    (DataLoaders(loader(X, Y)), TypeError, 'learner.model, dls')])
def test_loaders_that_are_none(train, kind, said):
    with pytest.raises(kind, match=said): as_learner(net(), train, loader(X, Y))
    with pytest.raises(kind, match='valid'): as_learner(net(), loader(X, Y), 5 if kind is TypeError else loader(X))

def test_an_iterable_data_set_has_no_length():
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(X, Y))
    with pytest.raises(TypeError, match='train: the loader has no length'):
        as_learner(net(), DataLoader(Stream(), batch_size=4))

def test_inputs_in_a_dictionary_and_several_inputs():
    ds = [(dict(u=X[i], v=V[i]), Y[i]) for i in range(60)]
    for train in (DataLoader(ds, batch_size=20), loader(X, V, Y)):
        res = prune(Two(), 'taylor', .5, dls=(train, train), fine_tune_epochs=1, shrink=True)
        assert res.report.tuned.n == 60 and res.model.a.out_features == 8

def test_batches_of_one():
    plain = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)); one = loader(X, Y, bs=1)
    assert prune(plain, 'magnitude', .5, dls=(one, one), fine_tune_epochs=1, lr=.001).report.tuned.n == 60
    with pytest.raises(ValueError, match='dls.train: a batch of one example'):
        fit(as_learner(net(), loader(X[:17], Y[:17]), loader(X, Y)), 1)

def test_prune_takes_a_model_and_loaders():
    run = lambda *dls: prune(net(), 'magnitude', .5, dls=dls if len(dls) > 1 else dls[0], fine_tune_epochs=1).report
    with pytest.warns(UserWarning, match='judged by its own training data'): one = run(loader(X, Y))
    two, three = run(loader(X, Y), loader(X[:30], Y[:30])), run(loader(X, Y), loader(X[:30], Y[:30]),
                                                                loader(X[:9], Y[:9]))
    assert (one.tuned.n, two.tuned.n, three.tuned.n) == (60, 30, 9) and three.dataset == 'TensorDataset'
    assert ([r.data['evaluated_on'] for r in (one, two, three)] == ['train', 'valid', 'test']
            and three.data['n_train'] == 60)
    model = net()
    assert (prune(model, 'magnitude', .5, dls=([(X, Y)], [(X, Y)]), fine_tune_epochs=0).model is model
            and (model[0].weight == 0).any())

def test_it_is_the_same_in_one_call():
    a, b = net(), net(); b.load_state_dict(a.state_dict()); dls = loader(X, Y), loader(X, Y)
    x, y = (prune(a, 'taylor', .5, dls=dls, fine_tune_epochs=2, lr=.05),
            prune(as_learner(b, *dls), 'taylor', .5, fine_tune_epochs=2, lr=.05))
    assert x.report.tuned == y.report.tuned and all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

def test_prune_on_our_loaders_keeps_what_they_know():
    r = prune(build('mlp', 1, 10, 8), 'magnitude', .5, dls=get_dls('digits'), fine_tune_epochs=0).report
    assert r.dataset == 'digits' and r.before.n == 359

@pytest.mark.parametrize('call,kind,said', [
    (lambda: prune(net(), 'magnitude', .5), TypeError,
     'learn: expected a Learner.*or a model beside dls=, got Sequential and dls=None'),
    (lambda: prune(as_learner(net(), *[loader(X, Y)]*2), 'magnitude', .5, dls=loader(X, Y)), ValueError,
     'dls: got a DataLoader beside a Learner'),
    (lambda: prune(net(), 'magnitude', .5, dls=(X, Y)), TypeError, 'dls: train: .*one batch'),
    (lambda: prune(net(), 'magnitude', .5, dls=()), ValueError, 'dls: 0 loaders'),
    (lambda: prune(net(), 'magnitude', .5, dls=[loader(X, Y)]*4), ValueError, 'dls: 4 loaders'),
    (lambda: prune(net(), 'magnitude', .5, dls=loader(X)), ValueError, 'dls: train: a batch'),
    (lambda: prune(net(1), 'magnitude', .5, dls=loader(X, (R > 0).float())), ValueError, 'dls: loss_func=None'),
    (lambda: prune('net', 'magnitude', .5), TypeError, 'learn: expected a Learner')])
def test_calls_of_prune_that_are_wrong(call, kind, said):
    with pytest.raises(kind, match=said): quiet(call)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_the_network_stays_on_its_device():
    for dev in ('cpu', 'cuda'):
        model = net().to(dev)
        res = prune(model, 'taylor', .5, dls=(loader(X, Y), loader(X, Y)), fine_tune_epochs=1, shrink=True)
        assert next(res.model.parameters()).device.type == dev and len(methods()['taylor'](net().to(dev), batch=(X, Y)))

# ---- what is no classification

def test_an_evaluation_without_counts_goes_through_every_record(tmp_path):
    res = prune(as_learner(net(1), *[loader(X, R)]*2, lr=.01, metrics=[mae, rmse, mae]), 'magnitude', .5,
                unit='channel', fine_tune_epochs=1, shrink=True)
    r = res.report
    assert set(r.tuned.metrics) == {'mae', '_rmse', 'mae_2'} and r.tuned.k is None and r.tuned.score == -r.tuned.loss
    assert r.tuned.metrics['mae'] == pytest.approx(float((res.model.eval()(X)-R).abs().mean().detach()), rel=1e-4)
    assert r.tuned.loss == pytest.approx(float(((res.model(X)-R)**2).mean().detach()), rel=1e-4)
    assert 'mae' in repr(r) and 'accuracy' not in repr(r) and 'mae' in r._repr_html_(
        ) and 'accuracy' not in r._repr_html_()
    assert ('loss and metrics on the test set', 'after fine-tuning') in r.to_frame().index
    r.save(tmp_path/'r.json'); assert Report.load(tmp_path/'r.json').tuned == r.tuned == Report.from_row(r.row()).tuned
    # a loss and no metric
    bare = prune(as_learner(net(1), *[loader(X, R)]*2, lr=.01), 'magnitude', .5, fine_tune_epochs=0).report
    bare.save(tmp_path/'b.json')
    assert Report.load(tmp_path/'b.json').final == bare.final == Report.from_row(bare.row()).final
    df = compare([r, bare, Report(before=Evaluation(3, 4), pruned=Evaluation(2, 4))])
    assert 'mae' in df['fine-tuned'][0] and list(df['against before']) == ['–', '–', 'no difference']
    assert plot_compare([r, bare]).axes[0].get_ylabel() == 'loss'
    with pytest.raises(ValueError, match='no interval around a loss'): verdict(r.tuned, r.before)

def test_a_search_goes_by_the_loss():
    res = quiet(prune, as_learner(net(1), *[loader(X, R)]*2, lr=.01), 'bestof', .5, n=3, fine_tune_epochs=0)
    assert res.found.evaluations >= 3 and res.report.final.k is None
    some = quiet(prune, as_learner(net(1), *[loader(X, R)]*2, lr=.01), 'bestof', .5, n=3, n_valid=8, fine_tune_epochs=0)
    assert some.found.evaluations == 3 and some.found.curve[0]['score'] < 0

def test_evaluating_leaves_the_learner_as_it_was(tmp_path):
    learn = Learner(DataLoaders(loader(X, R), loader(X, R)), net(1), loss_func=MSELossFlat(), metrics=mae,
                    path=tmp_path, cbs=SaveModelCallback(monitor='mae'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    kept, cbs, files = learn.recorder.values, list(learn.cbs), sorted(tmp_path.rglob('*')); learn.model.train()
    stamp = [f.stat().st_mtime_ns for f in files]
    a, b = (evaluate(learn, learn.dls.valid) for _ in range(2))
    assert (a == b and learn.recorder.values is kept and set(map(id, learn.cbs)) == set(map(id, cbs))
            and learn.model.training)
    assert sorted(tmp_path.rglob('*')) == files and [f.stat().st_mtime_ns for f in files] == stamp
    with pytest.raises(ValueError, match='no batches'): evaluate(learn, [])
    with torch.no_grad(): learn.model[6].bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='loss is nan'): evaluate(learn, learn.dls.valid)
    with pytest.raises(TypeError, match='or a Learner'): evaluate(net(1), loader(X, R))

# ---- learners that fastai makes

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for c,top in (('a', 128), ('b', 255)):
        (d/c).mkdir()
        for i in range(12): Image.fromarray(rng.integers(0, top, (32, 32, 3), dtype=np.uint8)).save(d/c/f'{i}.png')
    return d

def _vision(d):
    from fastai.vision.all import ImageDataLoaders, vision_learner, resnet18
    return vision_learner(ImageDataLoaders.from_folder(d, valid_pct=.25, seed=0, bs=8, num_workers=0), resnet18,
                          pretrained=False, metrics=accuracy)

def _multi_label(d):
    from fastai.vision.all import (DataBlock, ImageBlock, MultiCategoryBlock, RandomSplitter, get_image_files,
                                   vision_learner, resnet18)
    dls = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, splitter=RandomSplitter(.25, seed=0),
                    get_y=lambda f: [f.parent.name, *(['odd'] if int(f.stem) % 2 else [])]).dataloaders(
        d, bs=8, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy_multi)
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat)
    return learn

def _unet(d):
    from fastai.vision.all import SegmentationDataLoaders, get_image_files, unet_learner, resnet18
    bright = lambda f: (np.asarray(Image.open(f))[..., 0] > 60).astype(np.uint8)
    dls = SegmentationDataLoaders.from_label_func(d, get_image_files(d), bright, codes=['no', 'yes'], bs=4,
                                                  valid_pct=.25, seed=0, num_workers=0)
    return unet_learner(dls, resnet18, pretrained=False, metrics=Dice())

def _tabular(d, real=False):
    from fastai.tabular.all import (Categorify, CategoryBlock, FillMissing, Normalize, RegressionBlock,
                                    TabularDataLoaders, tabular_learner)
    rng, n = np.random.default_rng(0), 160
    df = pd.DataFrame(dict(c=rng.choice(['x', 'y', 'z'], n), a=rng.normal(size=n), b=rng.normal(size=n)))
    df['t'] = df.a+df.b if real else np.where(df.a+df.b > 0, 'p', 'q')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['c'],
                                     cont_names=['a', 'b'], y_names='t', bs=32,
                                     y_block=RegressionBlock() if real else CategoryBlock())
    return tabular_learner(dls, layers=[20, 10], metrics=mae if real else accuracy, n_out=1 if real else 2)

def _text(d):
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
    rng = np.random.default_rng(0); words = ['film', 'story', 'the', 'a']
    rows = [(' '.join(rng.choice(words, 10)) + (' good good' if i % 2 else ' bad bad'), 'np'[i % 2]) for i in range(60)]
    dls = TextDataLoaders.from_df(pd.DataFrame(rows, columns=['text', 'label']), text_col='text', label_col='label',
                                  bs=8, valid_pct=.25, seed=0, seq_len=12, num_workers=0)
    return text_classifier_learner(dls, AWD_LSTM, config={**awd_lstm_clas_config, 'emb_sz': 16, 'n_hid': 20,
                                                          'n_layers': 2}, pretrained=False, metrics=accuracy)

def _regression(d):
    return Learner(DataLoaders.from_dsets(*[list(zip(X, R))]*2, bs=16), net(1), loss_func=MSELossFlat(), metrics=mae)
def _two_inputs(d):
    return Learner(DataLoaders.from_dsets(*[list(zip(X, V, Y))]*2, bs=16), Two(), loss_func=CrossEntropyLossFlat(),
                   metrics=accuracy)

MADE = [(_vision, 'accuracy', True), (_multi_label, 'accuracy_multi', False), (_unet, 'dice', False),
        (_tabular, 'accuracy', True), (partial(_tabular, real=True), 'mae', False),
        (_text, 'accuracy', True), (_regression, 'mae', False), (_two_inputs, 'accuracy', True)]

LONG = dict(marks=pytest.mark.slow) # both units of a U-net
CASES = [pytest.param(*o, u, id=f"{getattr(o[0], '__name__', '_tabular_real')}-{u}",
                      **(LONG if (o[0], u) == (_unet, 'weight') else {}))
         for o in MADE for u in ('weight', 'channel')]

@pytest.mark.parametrize('make,metric,counts,unit', CASES)
def test_learners_that_fastai_makes(make, metric, counts, unit, pictures):
    learn = make(pictures)
    with learn.no_bar(), learn.no_logging():
        res = prune(learn, 'magnitude', .5, unit=unit, fine_tune_epochs=1, latency=False)
    r = res.report
    assert res.mask.sparsity == pytest.approx(.5, abs=.02) and r.params_removed > .1 and r.macs_removed > 0
    e = evaluate(learn, learn.dls.valid)
    assert e == r.tuned and (e.k is not None) == counts and np.isfinite(e.loss) and e.n > 0
    with learn.no_bar(): want = learn.validate() # fastai's own figures
    name = learn.metrics[0].name; assert name == metric
    assert ((e.accuracy if counts else e.metrics[name]) == pytest.approx(float(want[1]), abs=1e-5)
            and e.loss == pytest.approx(float(want[0]), rel=1e-3))
    assert Report.from_row(r.row()).tuned == r.tuned and (metric in repr(r)) != counts and len(r.to_frame())
    small = shrink(learn.model, res.mask, xb := mapped(lambda o: o.as_subclass(torch.Tensor), first(learn)))
    assert difference(learn.model, small, xb) < 1e-3 and count_params(small) <= count_params(learn.model)

def first(learn):
    from neuronprune.scoring import first_inputs
    return first_inputs(learn)

def test_a_text_classifier_says_what_it_left_alone(pictures):
    learn = _text(pictures)
    with learn.no_bar(), learn.no_logging(): res = prune(learn, 'magnitude', .5, fine_tune_epochs=0, latency=False)
    said = res.scores.skipped
    assert said['0.module.encoder'] == 'Embedding: weight belongs to no linear or convolution layer'
    assert any('LSTM' in o for o in said.values())
    assert not any('rnns' in k for k in res.mask) and learn.model[0].module.rnns[0].weight_hh_l0_raw.count_nonzero(
        ) == learn.model[0].module.rnns[0].weight_hh_l0_raw.numel()
    with pytest.raises(ValueError, match='dls: the inputs have different shapes'): prune(learn, 'taylor', .5)
    with pytest.raises(ValueError, match='model: .*chain'): prune(learn, 'mip', .5)

# ---- the front page: several sizes in one call

def test_a_vision_learner_at_three_sizes_in_a_folder(pictures, tmp_path, monkeypatch):
    from neuronprune import pipeline
    learn = _vision(pictures); state = copy.deepcopy(learn.model.state_dict()); one = pipeline._one_size
    def run(folder):
        learn = _vision(pictures); learn.model.load_state_dict(state)
        return prune(learn, 'magnitude', sizes=[.5, .3, .15], unit='channel', fine_tune_epochs=1, latency=False,
                     folder=tmp_path/folder)
    def stops(chain, i, folder):
        if i == 2: raise KeyboardInterrupt
        return one(chain, i, folder)
    whole = run('a')
    assert list(whole.rows.density) == [.5, .3, .15] and whole.rows.params_density.values == pytest.approx(
        [.5, .3, .15], abs=.005)
    assert len(plot_tradeoff(whole.rows).axes[0].lines[0].get_xdata()) == 3
    with monkeypatch.context() as m:
        m.setattr(pipeline, '_one_size', stops)
        with pytest.raises(KeyboardInterrupt): run('b')
    resumed, read = run('b'), run('a')
    cols = ['params_stored', 'macs_stored', 'dense_k', 'pruned_k', 'tuned_k', 'tuned_loss']
    for res in (resumed, read):
        assert res.rows[cols].equals(whole.rows[cols])
        assert all(torch.equal(v, res.model.state_dict()[k]) for k,v in whole.model.state_dict().items())

def test_a_torchvision_model_at_two_sizes():
    from torchvision.models.resnet import BasicBlock, ResNet
    model, x, y = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), torch.rand(24, 3, 32, 32), torch.arange(24) % 3
    dense = count_params(model)
    res = prune(model, 'taylor', sizes=[.5, .2], dls=(loader(x, y), loader(x, y)), lr=.01, fine_tune_epochs=1,
                latency=False)
    assert res.rows.params_density.values == pytest.approx([.5, .2], abs=.005) and res.report.tuned.n == 24
    assert count_params(res.model) == res.report.params_after < .21*dense

def test_a_table_at_two_sizes():
    learn = _tabular(None)
    with learn.no_bar(), learn.no_logging(): res = prune(learn, 'magnitude', sizes=[.7, .5], unit='channel',
                                                         fine_tune_epochs=1, latency=False)
    assert len(res.rows) == 2 and res.report.params_after == count_params(learn.model) and (
        res.rows.params_density.diff()[1:] < 0).all()

# ---- modules that hide their layers

class Sentences(nn.Module):
    "Torch's encoder between an embedding and a head."
    def __init__(self):
        super().__init__(); layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0., batch_first=True)
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.encoder(self.embed(x)).mean(1))

class Upwards(nn.Module):
    "A decoder: what it puts out is an image."
    def __init__(self):
        super().__init__(); self.start = nn.Linear(6, 8*16)
        self.up = nn.ConvTranspose2d(8, 10, 4, 2, 1); self.out = nn.ConvTranspose2d(10, 1, 4, 2, 1)
    def forward(self, x): return self.out(self.up(self.start(x.mean(1)).relu().view(-1, 8, 4, 4)).relu())

class Vit(nn.Module):
    "Torchvision's transformer on a small image."
    def __init__(self):
        super().__init__(); self.vit = VisionTransformer(8, 4, 2, 4, 16, 24, num_classes=3)
    def forward(self, x): return self.vit(x[:, None, :, :1].expand(-1, 3, -1, 8)[:, :, [0, 1, 2, 3, 4, 0, 1, 2]])

class Gpt(nn.Module):
    "GPT-2 in small, with a head on its last word."
    def __init__(self):
        hf = pytest.importorskip('transformers')
        super().__init__(); c = hf.GPT2Config(vocab_size=19, n_positions=8, n_embd=16, n_layer=2, n_head=4)
        self.gpt, self.head = hf.GPT2Model(c), nn.Linear(16, 3)
    def forward(self, x): return self.head(self.gpt(input_ids=x, use_cache=False).last_hidden_state[:, -1])

def hidden(kind):
    torch.manual_seed(0)
    x = torch.randint(19, (48, 8)) if kind is Gpt else torch.randn(48, 5, 6)
    y = torch.randn(48, 1, 16, 16) if kind is Upwards else torch.arange(48) % 3
    return kind().eval(), (x, y), [loader(x, y, bs=16)]*2

INSIDE = {Sentences:['encoder.layers.0.self_attn.q_proj', 'encoder.layers.1.linear1'], Upwards:['up'],
          Vit:['vit.encoder.layers.encoder_layer_0.self_attention.q_proj'],
          Gpt:['gpt.h.0.attn.c_attn', 'gpt.h.1.mlp.c_fc']}

@pytest.mark.parametrize('kind', INSIDE)
def test_prune_reaches_what_modules_hide(kind, tmp_path):
    "Cut, saved, and loaded into an instance of the class; the network it was given is as it was, tensor by tensor."
    model, (x, _), dls = hidden(kind); before = {k:v.clone() for k,v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    res = quiet(prune, model, 'magnitude', .5, unit='channel', scope='layer', dls=dls, fine_tune_epochs=1, shrink=True,
                latency=False)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    for n in INSIDE[kind]: assert 0 < (~res.mask[n]).sum() < len(res.mask[n]), n
    assert res.report.params_removed > .3
    res.save(tmp_path); back = load(tmp_path/'model.safetensors', kind())
    assert difference(res.model, back, x) == 0

def test_what_is_made_plain_can_be_pruned_again_and_goes_on_from_a_folder(tmp_path):
    model, _, dls = hidden(Sentences); learn = as_learner(model, *dls)
    args = dict(sizes=[.8, .6], scope='layer', fine_tune_epochs=1, latency=False)
    res = quiet(prune, learn, 'magnitude', unit='channel', folder=tmp_path, **args)
    again = quiet(prune, as_learner(hidden(Sentences)[0], *dls), 'magnitude', unit='channel', folder=tmp_path, **args)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k,v in res.model.state_dict().items())
    more = quiet(prune, learn, 'magnitude', sizes=[.4], unit='channel', fine_tune_epochs=0, latency=False)
    assert more.report.params_removed > .2

def test_snapshots_go_with_it():
    "Back to the initial weights, under the names of the plain layers."
    model, _, dls = hidden(Sentences); w = model.encoder.layers[0].self_attn.in_proj_weight.detach().clone()
    data = DataLoaders(*as_learner(model, *dls).dls.loaders[:2])
    learn = learner(model, data, lr=.1, loss_func=nn.CrossEntropyLoss())
    fit(learn, 1)
    assert not torch.equal(learn.model.encoder.layers[0].self_attn.in_proj_weight, w)
    res = quiet(prune, learn, 'lth', .5, fine_tune_epochs=0, latency=False)
    q = res.model.encoder.layers[0].self_attn.q_proj.weight; kept = q != 0
    assert 0 < kept.sum() < kept.numel() and torch.equal(q[kept], w[:16][kept])

class Reaching(nn.Module):
    "Uses the tensors of its attention itself."
    def __init__(self):
        super().__init__(); self.attn, self.a, self.b = nn.MultiheadAttention(6, 2), nn.Linear(6, 10), nn.Linear(10, 3)
    def forward(self, x): return self.b(self.a(x @ self.attn.in_proj_weight[:6].T).relu()).mean(1)

def test_a_network_that_reaches_into_its_attention_keeps_it():
    model, (x, y), dls = hidden(Reaching)
    res = quiet(prune, model, 'magnitude', .5, unit='channel', dls=dls, fine_tune_epochs=0, latency=False)
    assert res.model is model and type(model.attn) is nn.MultiheadAttention and (~res.mask['a']).sum() == 5

# ---- outputs and precisions

@dataclass
class Out:
    logits:torch.Tensor
    features:torch.Tensor

class Answering(nn.Module):
    "A network that returns its features beside the class scores, in the form `form`."
    def __init__(self, form): super().__init__(); self.body,self.head,self.form = net()[:-1],nn.Linear(16, 3),form
    def forward(self, x): h = self.body(x); return self.form(logits=self.head(h), features=h)

def test_outputs_in_a_dataclass_are_outputs():
    x = torch.randn(40, 12); loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=20)
    def pruned(form):
        torch.manual_seed(0); m = Answering(form)
        loss = lambda o, y: nn.functional.cross_entropy(o['logits'] if form is dict else o.logits, y)
        return prune(as_learner(m, loader, loader, loss_func=loss), 'magnitude', .5, unit='channel', shrink=True,
                     fine_tune_epochs=1, latency=False)
    a, b = pruned(dict), pruned(Out)
    assert list(a.mask) == list(b.mask) == ['body.0'] and torch.equal(a.mask['body.0'], b.mask['body.0'])
    assert b.model(x).features.shape == (40, 16) and b.report.tuned.k == a.report.tuned.k
    assert difference(a.model, b.model, x) == 0 and difference(b.model, Answering(Out), x) > 0

def test_what_is_mapped_keeps_its_class():
    out = mapped(lambda o: 2*o, Out(torch.ones(2), (torch.ones(1), None)))
    assert type(out) is Out and out.logits.sum() == 4 and out.features[0] == 2 and out.features[1] is None

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_networks_of_other_precisions_train(dtype):
    x, y = torch.randn(40, 12).to(dtype), torch.arange(40) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=20); m = net().to(dtype)
    res = prune(m, 'magnitude', .5, unit='channel', dls=(loader, loader), fine_tune_epochs=1, shrink=True,
                latency=False)
    assert {p.dtype for p in res.model.parameters()} == {dtype} and res.model[0].out_features < 16

def test_what_fastai_wraps_is_plain_in_scores_and_masks():
    torch.manual_seed(0)
    x = torch.randn(128, 6, generator=torch.Generator().manual_seed(0)); y = (x**2).sum(1, keepdim=True)
    m = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter('error') # "surgery failed" is a warning
        res = prune(m, 'snip', .5, dls=(loader, loader), fine_tune_epochs=1, lr=.01, latency=False)
    assert {type(v) for v in [*res.scores.values(), *res.mask.values()]} == {torch.Tensor}
    assert type(Scores({'0': TensorBase(torch.rand(3))}, 'weight')['0']) is torch.Tensor
