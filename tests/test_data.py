"""Reading files through torchvision, folders, error messages, seeds, and the balance of the calibration batch."""
import gzip, os, pickle, shutil, struct
from pathlib import Path
import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from torchvision import datasets as tv
from torchvision import transforms as tvt
import neuronprune.data as data
from neuronprune.files import DamagedFileError
from neuronprune.data import calib_batch, get_dls
from neuronprune.datasets import stratified
from neuronprune.presets import PRESETS

REAL = Path(os.environ.get('NEURONPRUNE_DATA', ''))/'MNIST'/'raw'
real = pytest.mark.skipif(not (os.environ.get('NEURONPRUNE_DATA') and REAL.is_dir()),
                          reason='NEURONPRUNE_DATA does not name a folder with MNIST/raw')

def write_idx(folder, n_train=60, n_test=20, seed=0):
    "A tiny MNIST in the published file format."
    folder.mkdir(parents=True, exist_ok=True); rng = np.random.default_rng(seed)
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
    batch = lambda n: dict(data=np.arange(n*3072, dtype=np.int64).astype(np.uint8).reshape(n, 3072),
                           labels=[i % 10 for i in range(n)])
    for f in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']: (d/f).write_bytes(pickle.dumps(batch(20)))
    (d/'batches.meta').write_bytes(pickle.dumps(dict(label_names=[f'c{i}' for i in range(10)])))
    with pytest.raises(DamagedFileError, match='cifar-10-batches-py.*corrupted'): get_dls('cifar10', root=tmp_path)
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
    for o in ('flowers-102/jpg', 'flowers-102/imagelabels.mat', 'flowers-102/setid.mat'):
        (tmp_path/o).mkdir(parents=True)
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
    again = get_dls('imagenet', 16, root=tmp_path, bs=4, augment='resized_crop', valid_pct=.25, device='cpu',
                    num_workers=1)
    assert not torch.equal(*epochs) and torch.equal(torch.cat([x for x,_ in again.train]), epochs[0])
    def seeded(): dls.train.g.manual_seed(7); return torch.cat([x for x,_ in dls.train])
    # crops, too, follow the loader's generator
    assert torch.equal(seeded(), seeded()) and not torch.equal(seeded(), epochs[0])

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

@pytest.mark.parametrize('kw,said', [(dict(valid_pct=10), 'did you mean 0.1'), (dict(valid_pct=True), 'valid_pct'),
                                     (dict(valid_pct=0), 'at least one'),
    (dict(bs=0), 'bs=0'), (dict(size=0), 'size=0'), (dict(c_in=2), 'c_in=2'), (dict(n_train=9999), 'n_train=9999'),
                                     (dict(seed=.5), 'seed=0.5'),
    (dict(augment='mixup'), 'crop'), (dict(augment='resized_crop'), 'resident'), (dict(normalize='zscore'), 'standard'),
    (dict(normalize=((.5,), (0.,))), 'positive')])
def test_bad_arguments(kw, said):
    with pytest.raises((ValueError, TypeError), match=said): get_dls('digits', **kw)

def test_unknown_name_and_preset():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"): get_dls('cifar-10')
    with pytest.raises(FileNotFoundError, match='no/such/folder'): get_dls('no/such/folder')
    with pytest.raises(ValueError, match='root='): get_dls('folder')
    for (s,n),kw in PRESETS.items(): assert data.preset(s, n) == kw and n in data.DATASETS

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

@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), m=st.integers(1, 30), seed=st.integers(0, 99),
       k=st.integers(1, 40))
def test_calibration_batch_is_balanced_or_refused(counts, m, seed, k):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if m > min(counts):
        with pytest.raises(ValueError, match=f'class {counts.index(min(counts))} has {min(counts)} images'):
            data.balanced(y, len(counts), m, seed)
    else:
        idx = data.balanced(y, len(counts), m, seed)
        assert torch.bincount(y[idx]).tolist() == [m]*len(counts) and len(set(idx.tolist())) == len(idx)
        assert torch.equal(idx[:len(counts)], data.balanced(y, len(counts), 1, seed))
    if k < len(y):
        picked,rest = stratified(y, k, seed)
        assert len(picked) == k and sorted((*picked.tolist(), *rest.tolist())) == list(range(len(y)))
        own = torch.tensor(counts); share = torch.bincount(y[picked], minlength=len(counts)) - k*own/len(y)
        assert (share.abs() <= .5 + len(own)/2*own/len(y) + 1e-6).all(), (
            'each class is rounded to a half, and the sum of that is shared')

def test_calibration_batch_is_plain_training_input():
    dls = get_dls('digits', 16, augment='crop+flip+cutout+rotate', normalize='standard', device='cpu')
    for split,dl in zip(('train', 'valid', 'test'), dls.loaders):
        xb,yb = calib_batch(dls, 3, split=split)
        plain = dl.prep.plain()(dl.dataset.x)
        assert all((plain[dl.dataset.y == c] == x).flatten(1).all(1).any() for x,c in zip(xb, yb))
    xb,yb = calib_batch(dls)
    assert len(xb) == 10*int(torch.bincount(dls.valid.dataset.y).min())

class Shared:
    "What fastai puts around a loader on several processes: every other batch is for this one."
    def __init__(self, dl): self.dl, self.rank, self.world_size = dl, 0, 2
    def __iter__(self): yield from list(self.dl)[::2]

def test_calibration_batch_on_several_processes_is_that_of_one():
    dls = get_dls('digits', 16, n_train=200, device='cpu')
    shared = DataLoaders(*map(Shared, dls.loaders))
    for split in ('train', 'valid'):
        for a,b in zip(calib_batch(dls, n=12, split=split), calib_batch(shared, n=12, split=split)): assert a.equal(b)

def test_calibration_batch_from_foreign_loaders():
    x,y = torch.randn(40, 3, 5, 5),torch.arange(40) % 4
    ds = torch.utils.data.TensorDataset(x, y)
    fast = DataLoaders(DataLoader(ds, bs=7, shuffle=True), DataLoader(ds, bs=7, shuffle=True))
    plain = DataLoaders(torch.utils.data.DataLoader(ds, 7, shuffle=True),
                        torch.utils.data.DataLoader(ds, 9, shuffle=True))
    a,b = calib_batch(fast, 4, seed=2),calib_batch(plain, 4, seed=2)
    assert all(torch.equal(o, p) for o,p in zip(a, b)) and torch.bincount(a[1]).tolist() == [4]*4
    with pytest.raises(ValueError, match='third one'): calib_batch(fast, 1, split='test')
    with pytest.raises(ValueError, match='class 0 has 10 images'): calib_batch(fast, 11)
    with pytest.raises(ValueError, match='NaN'):
        calib_batch(DataLoaders(*[DataLoader(torch.utils.data.TensorDataset(x*float('nan'), y), bs=8)]*2), 1)
    with pytest.raises(ValueError, match='integer'):
        calib_batch(DataLoaders(*[DataLoader(torch.utils.data.TensorDataset(x, y.float()), bs=8)]*2), 1)
    with pytest.raises(ValueError, match='empty'): calib_batch(DataLoaders(*[DataLoader([], bs=8)]*2), 1)

def triples(x, y, form, dtype=torch.int64):
    "Examples of several inputs in one of the forms that loaders give them."
    z = x.flatten(1)
    return [dict(tuple=(a, b, c), nested=((a, b), c), mapping=(dict(a=a, b=b), c))[form]
            for a,b,c in zip(x, z, y.to(dtype))]

@pytest.mark.parametrize('form', ['tuple', 'nested', 'mapping'])
@pytest.mark.parametrize('torchs', [False, True])
def test_calibration_batch_of_several_inputs(form, torchs):
    x,y = torch.randn(40, 3, 5, 5),torch.arange(40) % 4
    ds,one = triples(x, y, form),list(zip(x, y))
    both = [torch.utils.data.DataLoader(o, 7, shuffle=True) if torchs else DataLoader(o, bs=7, shuffle=True)
            for o in (ds, one)]
    (xb,yb),(want,labels) = (calib_batch(DataLoaders(o, o), n=9, seed=1) for o in both)
    a,b = xb.values() if form == 'mapping' else xb
    assert isinstance(xb, dict if form == 'mapping' else tuple) and torch.equal(yb, labels)
    assert torch.equal(a, want) and torch.equal(b, want.flatten(1))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    x,y = torch.randn(40, 3),torch.arange(40) % 4
    a,b = (calib_batch(DataLoaders(*[DataLoader(list(zip(x, o)), bs=8)]*2), 3) for o in (y, y.to(dtype)))
    assert b[1].dtype == torch.int64 and all(torch.equal(o, p) for o,p in zip(a, b))

@pytest.mark.parametrize('items,said', [([dict(x=torch.zeros(3), y=0)]*8, 'a batch is a dict; expected a pair'),
                                        ([(torch.zeros(3),)]*8, 'expected a pair'),
    ([(torch.zeros(3), 'cat')]*8, 'labels of a batch are a'), ([(torch.zeros(3), True)]*8, 'integer class labels'),
                                        ([(torch.zeros(3), torch.tensor(1j))]*8, 'integer class labels'),
    ([(torch.zeros(3), .5)]*8, 'integer class labels'),
                                        ([(torch.zeros(3), torch.zeros(4).long())]*8, 'integer class labels')])
def test_batches_that_are_no_pairs(items, said):
    for dl in (DataLoader(items, bs=4), torch.utils.data.DataLoader(items, 4)):
        with pytest.raises(ValueError, match=said): calib_batch(DataLoaders(dl, dl), n=2)

def test_inputs_of_different_shapes_and_no_loaders():
    rows = [(torch.zeros(i//4+1), i % 2) for i in range(8)]
    with pytest.raises(ValueError, match='dls: the inputs have different shapes'):
        calib_batch(DataLoaders(*[DataLoader(rows, bs=4)]*2), n=8)
    for bad in ([1, 2], 5, torch.zeros(4, 1, 8, 8), (torch.zeros(3), torch.zeros(3)),
                torch.utils.data.DataLoader(rows, 4), None):
        with pytest.raises(TypeError, match='^dls.*: expected fastai DataLoaders'): calib_batch(bad, n=2)

# files that are not what they should be

IDX = ['train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte']

def test_gzipped_idx_files(tmp_path):
    write_idx(tmp_path/'plain'); write_idx(tmp_path/'gz')
    for f in IDX:
        (tmp_path/'gz'/f'{f}.gz').write_bytes(gzip.compress((tmp_path/'gz'/f).read_bytes())); (tmp_path/'gz'/f).unlink()
    a, b = (get_dls('mnist', root=tmp_path/o, device='cpu') for o in ('plain', 'gz'))
    assert all(torch.equal(x.dataset.x, y.dataset.x) and torch.equal(x.dataset.y, y.dataset.y)
               for x,y in zip(a.loaders, b.loaders))

head = lambda *n: struct.pack(f'>{len(n)}I', *n)
BROKEN = dict(empty=b'', html=b'<!DOCTYPE html><html>not found</html>'*9, header=head(2051, 60)[:6],
              magic=head(2052, 60, 28, 28)+bytes(60*784), dtype=bytes([0, 0, 13, 3])+head(60, 28, 28)+bytes(60*784),
              labels=head(2049, 60)+bytes(60), huge=head(2051, 2**31, 28, 28)+bytes(60*784), most=head(
    2051, *[2**32-1]*3)+bytes(9), none=head(2051, 0, 28, 28), short=head(2051, 60, 28, 28)+bytes(60*784-1),
              long=head(2051, 60, 28, 28)+bytes(60*784+1), side=head(2051, 60, 14, 56)+bytes(60*784),
              more=head(2051, 61, 28, 28)+bytes(61*784), fewer=head(2051, 59, 28, 28)+bytes(59*784))

@pytest.mark.parametrize('gz', [False, True])
@pytest.mark.parametrize('kind', BROKEN)
def test_broken_idx_files(tmp_path, kind, gz):
    write_idx(tmp_path); f = tmp_path/IDX[0]; f.unlink()
    if gz: (tmp_path/f'{f.name}.gz').write_bytes(gzip.compress(BROKEN[kind]))
    else: f.write_bytes(BROKEN[kind])
    with pytest.raises(DamagedFileError, match=f'path=.*(images|labels).*ubyte.*{data.FETCH}'):
        get_dls('mnist', root=tmp_path)

def test_broken_label_and_gzip_files(tmp_path):
    write_idx(tmp_path); f = tmp_path/IDX[3]; good = f.read_bytes()
    for bad, said in [(good[:-1]+bytes([10]), 'label 10'), (head(2049, 19)+bytes(19), '19 labels for the 20 images'),
                      (good[:-1], 'fewer'), (b'\x1f\x8b', 'starts with')]:
        f.write_bytes(bad)
        with pytest.raises(DamagedFileError, match=f'path=.*{f.name}.*{said}'): get_dls('mnist', root=tmp_path)
    f.unlink(); z = gzip.compress(good)
    for bad in (z[:-9], z[:20], b'', b'<html>', z[:30]+bytes([z[30]^255])+z[31:], good):
        (tmp_path/f'{f.name}.gz').write_bytes(bad)
        with pytest.raises(DamagedFileError, match=f'path=.*{f.name}.gz'): get_dls('mnist', root=tmp_path)

def numbers(dls): return [len(o.dataset) for o in dls.loaders]

def test_links_that_lead_back(tmp_path):
    root = tmp_path/'im'; write_images(root, dict(cat=10, dog=10))
    want = numbers(get_dls(root, valid_pct=.2, device='cpu'))
    for link, to in [(root/'cat'/'loop', root), (root/'cat'/'loop', root/'cat'), (root/'bird', root/'dog'),
                     (root/'cat'/'x.png', root/'dog'/'0001.png'), (root/'cat'/'x.png', root/'cat'/'0001.png'),
                     (root/'all', tmp_path)]:
        link.symlink_to(to)
        with pytest.raises(ValueError, match=f'folder: .*{link.name}.* once more; remove the link'):
            get_dls(root, valid_pct=.2)
        link.unlink()
    write_images(tmp_path/'other', dict(fish=10), seed=1); (root/'fish').symlink_to(tmp_path/'other'/'fish')
    (root/'notes.txt').symlink_to(root/'cat'/'0001.png')
    shutil.copy(root/'cat'/'0001.png', tmp_path/'alone.png'); (root/'dog'/'new.png').symlink_to(tmp_path/'alone.png')
    assert sum(numbers(get_dls(root, valid_pct=.2, device='cpu'))) == sum(want) + 11, (
        'links to what is not read otherwise are welcome')
    (root/'cat'/'new2.png').symlink_to(tmp_path/'alone.png')
    with pytest.raises(ValueError, match='once more'): get_dls(root, valid_pct=.2)

def test_links_between_the_parts(tmp_path):
    for p in ('train', 'test'): write_images(tmp_path/p, dict(cat=8, dog=8), seed=ord(p[1]))
    (tmp_path/'test'/'cat'/'same.png').symlink_to(tmp_path/'train'/'cat'/'0001.png')
    with pytest.raises(ValueError, match='same.png'): get_dls(tmp_path, valid_pct=.2)
    (tmp_path/'test'/'cat'/'same.png').unlink(); (tmp_path/'valid').symlink_to(tmp_path/'train')
    with pytest.raises(ValueError, match='once more'): get_dls(tmp_path, valid_pct=.2)

@pytest.mark.parametrize('lazy', [False, True])
@pytest.mark.parametrize('content', ['empty', 'html', 'half', 'header', 'flipped'])
def test_broken_images(tmp_path, content, lazy):
    write_images(tmp_path, dict(cat=10, dog=10)); f = tmp_path/'dog'/'0003.png'; b = f.read_bytes()
    f.write_bytes(dict(empty=b'', html=b'<!DOCTYPE html>', half=b[:len(b)//2], header=b[:20],
                       flipped=b[:60]+bytes([b[60]^255])+b[61:])[content])
    with pytest.raises(DamagedFileError, match='path=.*0003.png.*delete or replace it'):
        dls = get_dls(tmp_path, valid_pct=.2, bs=4, resident=False if lazy else None, device='cpu')
        for dl in dls.loaders: list(dl)

def test_other_classes_in_the_validation_images_of_imagenet(tmp_path):
    write_images(tmp_path/'train', dict(n01=4, n02=4)); write_images(tmp_path/'val', dict(n02=4))
    with pytest.raises(ValueError, match='they must be the same'): get_dls('imagenet', 8, root=tmp_path)

@pytest.mark.parametrize('line', ['v0', 'v0,', 'v0,n99 1 2', 'v0,n01,more'])
def test_broken_tables_of_labels(tmp_path, line):
    root = tmp_path/'ILSVRC'/'Data'/'CLS-LOC'; write_images(root, dict(val=1))
    write_images(root/'train', dict(n01=4, n02=4))
    (tmp_path/'LOC_val_solution.csv').write_text(f'ImageId,PredictionString\n{line}\n')
    with pytest.raises(DamagedFileError, match='path=.*LOC_val_solution.csv'): get_dls('imagenet', 8, root=tmp_path)

@pytest.mark.parametrize('kw,said',
                         [(dict(size=16000), 'size=16000.*GiB'), (dict(size=10**7), 'size=10000000: expected'),
                          (dict(size=10**6, bs=10**9), 'size=1000000'),
                          (dict(normalize=(float('nan'),)*2), 'normalize=.*finite'),
                          (dict(normalize=(.1, float('inf'))), 'normalize'),
                          (dict(normalize=((.1,)*3, (.2,)*3)), 'normalize=.*1 each'),
                          (dict(normalize=((.1, .2), (.1, .2))), 'normalize=.*one per colour'),
                          (dict(normalize=((.1,)*3, (.1,)*2), c_in=3), 'normalize'),
                          (dict(normalize=(.5,)), 'normalize'), (dict(normalize=('a', 'b')), 'normalize'),
                          (dict(normalize=(.5, -.5)), 'normalize'),
                          (dict(normalize=(.5, 0)), 'normalize'), (dict(normalize=5), 'normalize=5'),
                          (dict(augment=5), 'augment'),
                          (dict(augment={'crop': 1}), 'augment'), (dict(augment=[5]), 'augment'),
                          (dict(augment=lambda x: x), 'augment: .<lambda>. does not take .x, g.'),
                          (dict(augment=lambda x, g: None), 'augment=<lambda>'),
                          (dict(augment=lambda x, g: x[:, :, 1:]), 'augment=<lambda>.*out of'),
                          (dict(augment=['flip', lambda x, g: x.long()]), 'augment=random_flip, <lambda>'),
                          (dict(augment=lambda x, g: x[0]), 'augment'), (dict(root=5), None)])
def test_bad_values_that_only_the_data_show(kw, said):
    if said is None:
        with pytest.raises(TypeError, match='root=5'): get_dls('mnist', **kw)
        return
    with pytest.raises((ValueError, TypeError), match=said): get_dls('digits', **kw)

@pytest.mark.parametrize('name', [[], {}, 5, None, b'digits', ('digits',)])
def test_names_that_are_none(name):
    with pytest.raises(TypeError, match='^name[:=]'): get_dls(name)

def test_augmentation_is_tried_without_a_trace():
    calls = []
    def jitter(x, g): calls.append(x.shape); return x + torch.rand(x.shape, generator=g)*.01
    state = torch.get_rng_state(); own, plain = get_dls('digits', augment=jitter), get_dls('digits')
    assert calls == [(1, 1, 8, 8)] and torch.equal(state, torch.get_rng_state())
    again = get_dls('digits', augment=jitter)
    assert (torch.equal(own.one_batch()[0], again.one_batch()[0])
            and torch.equal(own.valid.one_batch()[0], plain.valid.one_batch()[0]))
    three = get_dls('digits', normalize=([.1, .2, .3], [1., 2., 3.]), c_in=3)
    assert three.record['mean'] == [.1, .2, .3]

@real
def test_real_mnist():
    dls = get_dls('mnist', root=REAL.parents[1], bs=256, device='cpu')
    theirs = tv.MNIST(REAL.parents[1], train=False)
    assert torch.equal(dls.test.dataset.x[:,0], theirs.data) and dls.record['n_train'] == 54_000
    x = dls.train.prep(dls.train.dataset.x)
    assert x.mean().abs() < .01 and (x.std() - 1).abs() < .01
    assert torch.bincount(calib_batch(dls)[1]).tolist() == [250]*10
