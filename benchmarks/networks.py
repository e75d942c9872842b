"""Networks of other people cut in half, layer by layer, beside Torch-Pruning on the same ones in the same run.

python benchmarks/networks.py                       all networks whose packages are installed
python benchmarks/networks.py vit_b_16 bert         those
python benchmarks/networks.py --seed 3 --csv FILE   other random channels; the table as a file

Random weights, random norms (scales, shifts, running statistics), random channels, half of every layer.
`removable`: layers with removable channels of all layers. `removed`: share of the parameters that is gone.
`apart`: the largest difference between the masked and the cut network on inputs that neither trace nor check has
seen, as a share of the largest output; in double precision where single does not reach 1e-5.
`seconds`: processor time of trace and cut. Torch-Pruning checks nothing; `tp_runs` says whether its result does, and
`tp_least` the smallest share of its channels that a layer keeps: less than .5 is more than was asked for."""
import os
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
import argparse, copy, time, warnings
import pandas as pd, torch, torchvision
from torch import nn
from neuronprune.allocate import allocate
from neuronprune.core import feed, layers, mapped, tensors
from neuronprune.forms import unpacked
from neuronprune.graph import trace
from neuronprune.masks import Scores
from neuronprune.surgery import apply, difference, shrink

def image(side=224): return torch.randn(2, 3, side, side)
def words(n=16, vocabulary=99): return torch.randint(0, vocabulary, (2, n))

class Sentences(nn.Module):
    "An LSTM that classifies."
    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(99, 32), nn.Linear(32, 48)
        self.lstm, self.hidden, self.out = nn.LSTM(48, 64, batch_first=True), nn.Linear(64, 40), nn.Linear(40, 5)
    def forward(self, x):
        return self.out(self.hidden(self.lstm(self.inner(self.words(x)).relu())[0][:, -1]).relu())

def vision(name, side=224):
    def make(): return getattr(torchvision.models, name)(weights=None), image(side)
    return make
def segmentation(): return torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None), image(96)
def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.Sequential(nn.Linear(32, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 10)), torch.randn(2, 9, 32)
def timm(name, side=224):
    def make():
        import timm as package
        return package.create_model(name, pretrained=False), image(side)
    return make
def hub(family, config):
    "A small network of transformers with a head; `config` are its sizes."
    def make():
        import transformers as t
        c = getattr(t, f'{family}Config')(**config)
        return getattr(t, f'{family}ForSequenceClassification')(c), words()
    return make

_BERT = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
NETWORKS = dict(
    resnet50=vision('resnet50'), resnext50=vision('resnext50_32x4d'), regnet_y_400mf=vision('regnet_y_400mf'),
    mobilenet_v2=vision('mobilenet_v2'), shufflenet_v2=vision('shufflenet_v2_x1_0'), ghostnet=timm('ghostnet_100'),
    densenet121=vision('densenet121'), fcn_resnet50=segmentation, convnext_t=vision('convnext_tiny'),
    swin_t=vision('swin_t'), maxvit_t=vision('maxvit_t'), vit_b_16=vision('vit_b_16'),
    vit_tiny=timm('vit_tiny_patch16_224'), mixer_s16=timm('mixer_s16_224'), encoder=encoder, lstm=Sentences,
    bert=hub('Bert', _BERT),
    distilbert=hub('DistilBert', dict(vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=128)),
    gpt2=hub('GPT2', dict(vocab_size=99, n_positions=32, n_embd=64, n_layer=2, n_head=4, pad_token_id=0)),
    llama=hub('Llama', dict(vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, pad_token_id=0,
                            num_attention_heads=4, num_key_value_heads=2)))

def randomised(model, seed):
    "The model with norms that are not the identity and heads that are not zero, in evaluation mode."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1 and not p.any(): p.data = torch.randn(p.shape, generator=g)*.02
    for m in model.modules():
        if not hasattr(m, 'running_mean') and 'Norm' not in type(m).__name__: continue
        for k,p in [*m._parameters.items(), *m._buffers.items()]:
            if p is None or not p.is_floating_point(): continue
            v = torch.rand(p.shape, generator=g)
            p.data = .5+v if k in ('weight', 'running_var') else v-.5
    return model.eval()

def count(model): return sum(p.numel() for p in model.parameters())

def fresh(x): return mapped(lambda o: torch.randn_like(o) if o.is_floating_point() else o.flip(-1), x)

def ours(model, x, seed):
    "What this package makes of it: a row."
    began, g = time.process_time(), torch.Generator().manual_seed(seed)
    model = unpacked(model); graph = trace(model, x)
    scores = Scores({n:torch.rand(len(graph.out_slots[n]), generator=g) for n in graph.removable}, 'channel',
                    graph=graph)
    mask = allocate(scores, .5, scope='layer'); small = shrink(model, mask, x)
    secs, x = time.process_time()-began, fresh(x)
    apart = difference(apply(copy.deepcopy(model), mask), small, x)
    if apart > 1e-5:
        wide = mapped(lambda o: o.double() if o.is_floating_point() else o, x)
        apart = difference(apply(copy.deepcopy(model).double(), mask), copy.deepcopy(small).double(), wide)
    return dict(layers=len(graph.layers), removable=len(graph.removable), removed=1-count(small)/count(model),
                apart=apart, seconds=secs, outputs=graph.outputs)

def theirs(model, x, outputs):
    "What Torch-Pruning makes of it, the output layers left alone: (share of the parameters, does the result run?)."
    import torch_pruning as tp
    mods = dict(model.named_modules()); began = time.process_time()
    kw = dict(in_channel_groups={}, out_channel_groups={}, num_heads=heads(model), channel_groups={})
    before, wide = count(model), {n:len(m.weight) for n,m in layers(model).items()}
    tp.pruner.BasePruner(model, x, importance=tp.importance.RandomImportance(), pruning_ratio=.5,
                         ignored_layers=[mods[n] for n in outputs], **kw).step()
    secs = time.process_time()-began
    try:
        with torch.no_grad(): feed(model, fresh(x))
        runs = 'yes'
    except Exception as e: runs = f'no: {type(e).__name__}'
    kept = min(len(m.weight)/wide[n] for n,m in layers(model).items() if wide[n] > 1)
    return dict(tp_removed=1-count(model)/before, tp_least=kept, tp_runs=runs, tp_seconds=secs)

def heads(model):
    "Heads of every q, k and v that have a number of heads above them, as Torch-Pruning wants to be told."
    res = {}
    for m in model.modules():
        n = next((getattr(m, k) for k in ('num_heads', 'num_attention_heads', 'n_heads') if hasattr(m, k)), None)
        if not isinstance(n, int): continue
        for k,c in m.named_children():
            if isinstance(c, nn.Linear) and k in ('query', 'key', 'value', 'qkv', 'q_lin', 'k_lin', 'v_lin'): res[c] = n
    return res

def row(name, seed):
    "One line of the table."
    try:
        with torch.random.fork_rng(): torch.manual_seed(seed); made = NETWORKS[name]()
    except ImportError as e: return dict(network=name, said=f'not installed: {e.name}')
    model, x = made if isinstance(made, tuple) else (made, words())
    model, res = randomised(model, seed), dict(network=name)
    try: res.update(ours(model, x, seed))
    except Exception as e: res.update(said=f'{type(e).__name__}: {str(e).splitlines()[0][:90]}')
    try: res.update(theirs(model, x, res.pop('outputs', [])))
    except Exception as e: res.update(tp_runs=f'fails: {type(e).__name__}')
    return res

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('networks', nargs='*', help=', '.join(NETWORKS)); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--csv'); a = p.parse_args(); warnings.simplefilter('ignore'); rows = []
    if unknown := set(a.networks)-set(NETWORKS): p.error(f"{', '.join(unknown)}: expected {', '.join(NETWORKS)}")
    for n in a.networks or NETWORKS:
        rows.append(row(n, a.seed)); df = pd.DataFrame(rows)
        print(df.tail(1).to_string(index=False, header=len(rows) == 1, float_format='{:.3g}'.format), flush=True)
    print(); print(df.to_string(index=False, float_format='{:.3g}'.format))
    if a.csv: df.to_csv(a.csv, index=False)
