"""CPU seconds of `trace` beside those of Torch-Pruning's dependency graph, on one thread, and the seconds per layer.

python benchmarks/trace.py                               every network
python benchmarks/trace.py --models resnet50@64 resnet110@32
python benchmarks/trace.py --profile resnet50@64         where the time goes"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, cProfile, pstats, time, warnings
import torch, torchvision
import torch_pruning as tp
from neuronprune.graph import trace
from neuronprune.models import build

OWN = ('resnet20', 'resnet56', 'resnet110') # from the zoo; the others are torchvision's
NETWORKS = ('resnet18@64', 'resnet50@64', 'resnet101@64', 'resnet152@64', 'resnet18@224', 'resnet50@224', 'resnet20@32',
            'resnet56@32', 'resnet110@32', 'vgg16_bn@224', 'densenet121@224', 'mobilenet_v3_small@224', 'vit_b_16@224')

def network(spec):
    "(model in evaluation, one example) of 'name@pixels'."
    name, size = spec.split('@'); size = int(size)
    model = (build(name, c_in=3, n_out=10, size=size, seed=0) if name in OWN
             else getattr(torchvision.models, name)(weights=None))
    return model.eval(), torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))

def cpu(f):
    start = time.process_time(); res = f()
    return time.process_time()-start, res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=NETWORKS, help='name@pixels')
    p.add_argument('--repeats', type=int, default=3, help='runs of each; the smallest counts')
    p.add_argument('--profile', metavar='MODEL'); a = p.parse_args()
    torch.set_num_threads(1); warnings.filterwarnings('ignore', module='torch_pruning')
    if a.profile:
        model, xb = network(a.profile); prof = cProfile.Profile(time.process_time); trace(model, xb)
        prof.runcall(trace, model, xb)
        return pstats.Stats(prof).sort_stats('tottime').print_stats(25).sort_stats('cumtime').print_stats(45)
    print(f"{'':24s} {'layers':>6} {'torch-pruning':>13} {'trace':>8} {'ratio':>6} {'ms per layer':>12}")
    for spec in a.models:
        model, xb = network(spec); theirs, ours = [], []
        for _ in range(a.repeats): # in turns, so that a busy machine slows both
            theirs.append(cpu(lambda: tp.DependencyGraph().build_dependency(model, xb))[0])
            secs, graph = cpu(lambda: trace(model, xb)); ours.append(secs)
        n = len(graph.layers)
        print(f"{spec:24s} {n:6d} {min(theirs):11.2f} s {min(ours):6.2f} s {min(ours)/min(theirs):6.1f} "
              f"{1000*min(ours)/n:12.1f}", flush=True)

if __name__ == '__main__': main()
