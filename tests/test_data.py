"""Reading files through torchvision, folders, error messages, seeds, and the balance of the calibration batch."""
import os, pickle, shutil, struct
from pathlib import Path
import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from torchvision import datasets as tv
from torchvision import transforms as tvt
import neuronprune.data as data
from neuronprune.data import calib_batch, get_dls, stratified

REAL = Path(os.environ.get('NEURONPRUNE_DATA', ''))/'MNIST'/'raw'
real = pytest.mark.skipif(not (os.environ.get('NEURONPRUNE_DATA') and REAL.is_dir()),
                          reason='NEURONPRUNE_DATA does not name a folder with MNIST/raw')

def write_idx(folder, n_train=60, n_test=20, seed=0):
    "A tiny MNIST in the published file format."
    folder.mkdir(parents=True); rng = np.random.default_rng(seed)
    for stem,n in (('train', n_train), ('t10k', n_test)):
        x,y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),(np.arange(n) % 10).astype(np.uint8)
        (folder/f'{stem}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, n, 28, 28) + x.tobytes())
        (folder/f'{stem}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, n) + y.tobytes())

def write_images(folder, counts, size=(12, 12), mode='RGB', seed=0):
    "Random pictures, `counts` = {class: how many}."
    rng = np.random.default_rng(seed)
    for c,n in counts.items():
        (folder/c).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            a = rng.integers(0, 256, (size[1], size[0]) + ((3,) if mode == 'RGB' else ()), dtype=np.uint8)
            Image.fromarray(a).save(folder/c/f'{i:04d}.png')

@pytest.mark.parametrize('name,cls', [('mnist', tv.MNIST), ('fashion_mnist', tv.FashionMNIST), ('kmnist', tv.KMNIST)])
def test_idx_files_agree_with_torchvision(tmp_path, name, cls):
    write_idx(tmp_path/cls.__name__/'raw')
    dls = get_dls(name, root=tmp_path, bs=8, normalize='standard', device='cpu')
    assert [len(o.dataset) for o in dls.loaders] == [54, 6, 20] and dls.record['n_test'] == 20
    info = data.DATASETS[name]
    theirs = cls(tmp_path, train=False, transform=tvt.Compose([tvt.ToTensor(), tvt.Normalize(info.mean, info.std)]))
    assert torch.equal(torch.cat([x for x,_ in dls.test]), torch.stack([x for x,_ in theirs]))
    assert torch.equal(torch.cat([y for _,y in dls.test]), theirs.targets)

def test_idx_files_in_root_itself_and_from_the_environment(tmp_path, monkeypatch):
    write_idx(tmp_path/'here')
    monkeypatch.setenv('NEURONPRUNE_DATA', str(tmp_path/'here'))
    assert get_dls('mnist', device='cpu').record['n_train'] == 54

def test_cifar_is_read_after_its_checksum_only(tmp_path, monkeypatch):
    d = tmp_path/'cifar-10-batches-py'; d.mkdir()
    batch = lambda n: dict(data=np.arange(n*3072, dtype=np.int64).astype(np.uint8).reshape(n, 3072), labels=[i % 10 for i in range(n)])
    for f in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']: (d/f).write_bytes(pickle.dumps(batch(20)))
    (d/'batches.meta').write_bytes(pickle.dumps(dict(label_names=[f'c{i}' for i in range(10)])))
    with pytest.raises(RuntimeError, match='corrupted'): get_dls('cifar10', root=tmp_path)
    monkeypatch.setattr(tv.CIFAR10, '_check_integrity', lambda self: True)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *a: True)
    dls = get_dls('cifar10', root=tmp_path, normalize='unit', device='cpu')
    assert dls.record['n_train'] == 90 and dls.vocab[3] == 'c3' and dls.one_batch()[0].shape == (64, 3, 32, 32)
    grey = get_dls('cifar10', root=tmp_path, normalize='unit', c_in=1, device='cpu')
    assert grey.one_batch()[0].shape == (64, 1, 32, 32)

def test_flowers_split_of_the_energy_papers(tmp_path, monkeypatch):
    class Flowers:
        classes = ['a', 'b']
        def __init__(self, root, split, download):
            n = dict(train=2, val=3, test=9)[split]
            self._image_files,self._labels = [tmp_path/f'{split}{i}.png' for i in range(n)],[i % 2 for i in range(n)]
    for o in ('flowers-102/jpg', 'flowers-102/imagelabels.mat', 'flowers-102/setid.mat'): (tmp_path/o).mkdir(parents=True)
    for s,n in dict(train=2, val=3, test=9).items():
        for i in range(n): Image.new('RGB', (20, 10), (i, i, i)).save(tmp_path/f'{s}{i}.png')
    monkeypatch.setattr(tv, 'Flowers102', Flowers)
    ours,official = (get_dls('flowers102', 16, root=tmp_path, official=o, device='cpu') for o in (False, True))
    assert [ours.record[k] for k in ('n_train', 'n_valid', 'n_test')] == [9, 3, 2]
    assert [official.record[k] for k in ('n_train', 'n_valid', 'n_test')] == [2, 3, 9]
    assert 'energy' in ours.record['split'] and 'torchvision' in official.record['split']

@pytest.mark.parametrize('kaggle', [False, True])
def test_imagenet_layouts(tmp_path, kaggle):
    root = tmp_path/'ILSVRC'/'Data'/'CLS-LOC' if kaggle else tmp_path
    write_images(root/'train', dict(n01=12, n02=12), (40, 30))
    if kaggle:
        write_images(root, dict(val=4), (30, 40))
        for i in range(4): (root/'val'/f'{i:04d}.png').rename(root/'val'/f'v{i}.JPEG')
        rows = ['ImageId,PredictionString'] + [f'v{i},n0{2-i%2} 1 2 3 4' for i in range(4)]
        (tmp_path/'LOC_val_solution.csv').write_text('\n'.join(rows))
    else: write_images(root/'val', dict(n01=2, n02=2), (30, 40))
    dls = get_dls('imagenet', 16, root=tmp_path, bs=4, augment='resized_crop', valid_pct=.25, device='cpu')
    assert dls.vocab == ['n01', 'n02'] and not dls.record['resident'] and dls.record['n_test'] == 4
    assert sorted(torch.cat([y for _,y in dls.test]).tolist()) == [0, 0, 1, 1]
    if kaggle: assert dls.test.dataset.y.tolist() == [1, 0, 1, 0]
    epochs = [torch.cat([x for x,_ in dls.train]) for _ in range(2)]
    again = get_dls('imagenet', 16, root=tmp_path, bs=4, augment='resized_crop', valid_pct=.25, device='cpu', num_workers=1)
    assert not torch.equal(*epochs) and torch.equal(torch.cat([x for x,_ in again.train]), epochs[0])
    def seeded(): dls.train.g.manual_seed(7); return torch.cat([x for x,_ in dls.train])
    assert torch.equal(seeded(), seeded()) and not torch.equal(seeded(), epochs[0]) # crops, too, follow the loader's generator

def test_folders_of_one_name_have_different_records(tmp_path):
    for i,n in enumerate((10, 10, 11)): write_images(tmp_path/str(i)/'im', dict(cat=n, dog=10), seed=0)
    shutil.copytree(tmp_path/'0', tmp_path/'3')
    rec = lambda i: get_dls(str(tmp_path/str(i)/'im'), bs=4, valid_pct=.2, device='cpu').record
    assert rec(0)['name'] == 'im' and rec(0) == rec(3) and rec(0)['files'] != rec(2)['files']
    f = next((tmp_path/'1'/'im').rglob('*.png')); f.write_bytes(f.read_bytes()+b' ')
    assert rec(0)['files'] != rec(1)['files'], 'the same names, another size'
    assert 'files' not in get_dls('digits').record

@pytest.mark.parametrize('parts', [('',), ('train', 'test'), ('train', 'valid', 'test'), ('train', 'val')])
def test_folder_layouts(tmp_path, parts):
    for i,p in enumerate(parts): write_images(tmp_path/p, dict(cat=10, dog=10), seed=i)
    dls = get_dls(str(tmp_path), bs=4, valid_pct=.2, device='cpu')
    total = sum(len(o.dataset) for o in dls.loaders)
    assert total == 20*len(parts) and dls.vocab == ['cat', 'dog'] and dls.c_in == 3 and dls.size == 12
    lazy = get_dls('folder', root=tmp_path, bs=4, valid_pct=.2, resident=False, device='cpu')
    assert all(torch.equal(a, b) for x,y in zip(dls.valid, lazy.valid) for a,b in zip(x, y))
    assert torch.equal(*(calib_batch(o, 2, split='train')[0] for o in (dls, lazy)))

def test_folder_grey_mixed_sizes_and_wrong_classes(tmp_path):
    write_images(tmp_path/'grey', dict(a=8, b=8), mode='L')
    assert get_dls(tmp_path/'grey', device='cpu', valid_pct=.2).one_batch()[0].shape[1] == 1
    write_images(tmp_path/'mixed', dict(a=8), (10, 8)); write_images(tmp_path/'mixed', dict(b=8), (9, 9))
    with pytest.raises(ValueError, match='give size='): get_dls(tmp_path/'mixed', valid_pct=.2)
    assert get_dls(tmp_path/'mixed', 8, valid_pct=.2, device='cpu').one_batch()[0].shape[-2:] == (8, 8)
    write_images(tmp_path/'two'/'train', dict(a=4, b=4)); write_images(tmp_path/'two'/'test', dict(a=4, c=4))
    with pytest.raises(ValueError, match='same'): get_dls(tmp_path/'two')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='one sub-folder'): get_dls(tmp_path/'empty')

@pytest.mark.parametrize('name', [o for o in data.DATASETS if o not in ('digits', 'folder')])
def test_missing_set_says_what_where_and_how(tmp_path, name):
    with pytest.raises(FileNotFoundError) as e: get_dls(name, root=tmp_path)
    assert str(tmp_path) in str(e.value) and 'Get it' in str(e.value) and 'NEURONPRUNE_DATA' in str(e.value)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('kw,said', [(dict(valid_pct=10), 'did you mean 0.1'), (dict(valid_pct=True), 'valid_pct'), (dict(valid_pct=0), 'at least one'),
    (dict(bs=0), 'bs=0'), (dict(size=0), 'size=0'), (dict(c_in=2), 'c_in=2'), (dict(n_train=9999), 'n_train=9999'), (dict(seed=.5), 'seed=0.5'),
    (dict(augment='mixup'), 'crop'), (dict(augment='resized_crop'), 'resident'), (dict(normalize='zscore'), 'standard'),
    (dict(normalize=((.5,), (0.,))), 'positive')])
def test_bad_arguments(kw, said):
    with pytest.raises((ValueError, TypeError), match=said): get_dls('digits', **kw)

def test_unknown_name_and_preset():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"): get_dls('cifar-10')
    with pytest.raises(FileNotFoundError, match='no/such/folder'): get_dls('no/such/folder')
    with pytest.raises(ValueError, match='root='): get_dls('folder')
    for (s,n),kw in data.PRESETS.items(): assert data.preset(s, n) == kw and n in data.DATASETS

def test_same_seed_same_bytes_and_no_global_state():
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    a,b,c = (get_dls('digits', 16, augment='crop+flip+cutout+rotate', seed=s) for s in (0, 0, 1))
    two = [[torch.cat([x for x,_ in o.train]) for _ in range(2)] for o in (a, b)]
    assert all(torch.equal(x, y) for x,y in zip(*two)) and not torch.equal(*two[0])
    assert torch.equal(a.test.dataset.x, c.test.dataset.x) and not torch.equal(a.valid.dataset.x, c.valid.dataset.x)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()

def test_no_training_batch_of_one():
    dls = get_dls('digits', bs=64, n_train=129)
    assert [len(y) for _,y in dls.train] == [64, 64] and len(dls.train) == 2

def test_large_sets_are_resized_batch_by_batch(monkeypatch):
    whole = get_dls('digits', 16)
    monkeypatch.setattr(data, 'LIMIT', 1000)
    lazy = get_dls('digits', 16)
    assert lazy.train.dataset.x.shape[-1] == 8
    torch.testing.assert_close(whole.one_batch()[0], lazy.one_batch()[0])

@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), m=st.integers(1, 30), seed=st.integers(0, 99), k=st.integers(1, 40))
def test_calibration_batch_is_balanced_or_refused(counts, m, seed, k):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if m > min(counts):
        with pytest.raises(ValueError, match=f'class {counts.index(min(counts))} has {min(counts)} images'): data.balanced(y, len(counts), m, seed)
    else:
        idx = data.balanced(y, len(counts), m, seed)
        assert torch.bincount(y[idx]).tolist() == [m]*len(counts) and len(set(idx.tolist())) == len(idx)
        assert torch.equal(idx[:len(counts)], data.balanced(y, len(counts), 1, seed))
    if k < len(y):
        picked,rest = stratified(y, k, seed)
        assert len(picked) == k and sorted((*picked.tolist(), *rest.tolist())) == list(range(len(y)))
        share = torch.bincount(y[picked], minlength=len(counts)) - k*torch.tensor(counts)/len(y)
        assert share.abs().max() <= 1

def test_calibration_batch_is_plain_training_input():
    dls = get_dls('digits', 16, augment='crop+flip+cutout+rotate', normalize='standard', device='cpu')
    for split,dl in zip(('train', 'valid', 'test'), dls.loaders):
        xb,yb = calib_batch(dls, 3, split=split)
        plain = dl.prep.plain()(dl.dataset.x)
        assert all((plain[dl.dataset.y == c] == x).flatten(1).all(1).any() for x,c in zip(xb, yb))
    xb,yb = calib_batch(dls)
    assert len(xb) == 10*int(torch.bincount(dls.valid.dataset.y).min())

def test_calibration_batch_from_foreign_loaders():
    x,y = torch.randn(40, 3, 5, 5),torch.arange(40) % 4
    ds = torch.utils.data.TensorDataset(x, y)
    fast = DataLoaders(DataLoader(ds, bs=7, shuffle=True), DataLoader(ds, bs=7, shuffle=True))
    plain = DataLoaders(torch.utils.data.DataLoader(ds, 7, shuffle=True), torch.utils.data.DataLoader(ds, 9, shuffle=True))
    a,b = calib_batch(fast, 4, seed=2),calib_batch(plain, 4, seed=2)
    assert all(torch.equal(o, p) for o,p in zip(a, b)) and torch.bincount(a[1]).tolist() == [4]*4
    with pytest.raises(ValueError, match='third one'): calib_batch(fast, 1, split='test')
    with pytest.raises(ValueError, match='class 0 has 10 images'): calib_batch(fast, 11)
    with pytest.raises(ValueError, match='NaN'): calib_batch(DataLoaders(*[DataLoader(torch.utils.data.TensorDataset(x*float('nan'), y), bs=8)]*2), 1)
    with pytest.raises(ValueError, match='integer'): calib_batch(DataLoaders(*[DataLoader(torch.utils.data.TensorDataset(x, y.float()), bs=8)]*2), 1)
    with pytest.raises(ValueError, match='empty'): calib_batch(DataLoaders(*[DataLoader([], bs=8)]*2), 1)

@real
def test_real_mnist():
    dls = get_dls('mnist', root=REAL.parents[1], bs=256, device='cpu')
    theirs = tv.MNIST(REAL.parents[1], train=False)
    assert torch.equal(dls.test.dataset.x[:,0], theirs.data) and dls.record['n_train'] == 54_000
    x = dls.train.prep(dls.train.dataset.x)
    assert x.mean().abs() < .01 and (x.std() - 1).abs() < .01
    assert torch.bincount(calib_batch(dls)[1]).tolist() == [250]*10
