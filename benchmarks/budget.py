"""Budgets: seconds of the solver, what is met of a budget, and accuracies beside equal and global cuts of equal cost.

    python benchmarks/budget.py --solver --met --compare

`--solver`: ResNet-50 with ten widths a layer, losses made up (convex curves of random height), three sparsities.
`--met`: share of the parameters, MACs and milliseconds that is left, beside what was asked for, on two networks.
`--compare`: accuracies on test after one epoch of fine-tuning, at equal MACs and at equal measured milliseconds:
budgets by each loss of `--by`, every layer cut alike (scope='layer'), one ranking (scope='global'); paired by seed.
"""
import argparse, itertools, os, platform, time, warnings
warnings.filterwarnings('ignore')

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k in ('solver', 'met', 'compare'): p.add_argument(f'--{k}', action='store_true')
    p.add_argument('--nets', nargs='+', default=['resnet20@8', 'lenet5_conv@28'],
                   help='names of the zoo, at so many pixels a side')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--sparsity', type=float, default=.5, help='share of the MACs to remove')
    p.add_argument('--faster', type=float, default=.25, help='share of the milliseconds to remove')
    p.add_argument('--costs', nargs='+', default=['macs', 'latency'])
    p.add_argument('--by', nargs='+', default=['error', 'kl'], help='losses of the budgets that are compared')
    return p.parse_args()

def made_up(scores, seed):
    "A `Sensitivity` of these scores with convex curves, at ten widths."
    import numpy as np, pandas as pd
    from neuronprune.sensitivity import Sensitivity, together
    draw, rows, tied = np.random.default_rng(seed), [], {}
    for keys in together(scores):
        n, height, bend = len(scores.graph.out_slots[keys[0]]), draw.uniform(.002, .05), draw.uniform(1.5, 4)
        tied[keys[0]] = keys
        rows += [dict(layer=keys[0], sparsity=i/10, kept=n-n*i//10, units=n, error=height*np.expm1(bend*i/10))
                 for i in range(1, 10)]
    return Sensitivity(pd.DataFrame(rows), tied, {}, None, {})

def solver():
    import torch
    from dataclasses import replace
    from neuronprune.all import allocate, build, methods, trace
    from neuronprune.sensitivity import facts
    net, xb = build('resnet50', 3, 100, 32, seed=0), torch.rand(2, 3, 32, 32)
    g = trace(net, xb); scores = methods()['magnitude'](net, None, graph=g, unit='channel')
    s = replace(made_up(scores, 0), facts=facts(net, xb, g))
    for of in ('params', 'macs'):
        for sparsity in (.2, .5, .8):
            start, cpu = time.perf_counter(), time.process_time()
            b = allocate(scores, sparsity, scope='budget', of=of, sensitivity=s).meta['budget']
            print(f"{of:7s} sparsity {sparsity}: solver {b['secs']:.2f} s, the whole of allocate "
                  f"{time.perf_counter()-start:.2f} s ({time.process_time()-cpu:.2f} CPU s), gap {100*b['gap']:.2f} %, "
                  f"{b['status']}, {100*b['cost']/b['limit']:.2f} % of the budget", flush=True)

def trained(net, seed, epochs):
    "(learner, scores, a batch) of a network trained on the digits."
    from neuronprune.all import build, fit, get_dls, learner, methods, trace
    name, size = net.split('@')[0], int(net.split('@')[1])
    dls = get_dls('digits', size=size, bs=64, seed=seed)
    learn = learner(build(name, 1, 10, size, seed=seed), dls, lr=.05); fit(learn, epochs, seed=seed)
    xb, _ = dls.valid.one_batch(); g = trace(learn.model, xb)
    return learn, methods()['magnitude'](learn.model, dls, graph=g, unit='channel'), xb

def cost_functions(learn, table, xb):
    "What is counted -> function of a mask."
    from neuronprune.all import count_macs, count_params, shrink
    small = lambda m: shrink(learn.model, m, xb)
    return dict(params=lambda m: count_params(small(m)), macs=lambda m: count_macs(small(m), xb),
                latency=lambda m: table.measure(m))

def met(args):
    from neuronprune.all import allocate, count_macs, count_params
    from neuronprune.latency import latency_table
    from neuronprune.sensitivity import sensitivity
    for name in args.nets:
        learn, scores, xb = trained(name, 0, 1)
        s, table = sensitivity(learn, scores), latency_table(learn.model, xb, scores.graph)
        print(name, s, table)
        whole = dict(params=count_params(learn.model), macs=count_macs(learn.model, xb), latency=table.ms)
        for of,count in cost_functions(learn, table, xb).items():
            for sparsity in (.1, .2, .3) if of == 'latency' else (.2, .5, .8):
                m = allocate(scores, sparsity, scope='budget', of=of, sensitivity=s, latencies=table)
                left, b = count(m)/whole[of], m.meta['budget']
                print(f"{name} {of:7s} asked {1-sparsity:.2f}, promised {1-m.meta['achieved']:.3f}, "
                      f"measured {left:.3f}: {100*(left/(1-sparsity)-1):+.1f} % ({b['status']}, {b['secs']:.2f} s)",
                      flush=True)

def at_cost(scores, scope, cost, limit, tries=6):
    "The mask of this scope whose cost is nearest to `limit` from below, by bisection of the sparsity."
    from neuronprune.all import allocate
    lo, hi, best = 0., .98, None
    for _ in range(tries):
        mid = (lo+hi)/2; m = allocate(scores, mid, scope=scope); c = cost(m)
        if c <= limit: hi, best = mid, (m, c)
        else: lo = mid
    return best or (m, c)

def compare(args):
    from dataclasses import replace
    import pandas as pd
    from neuronprune.all import allocate, evaluate
    from neuronprune.analysis import paired, summary
    from neuronprune.core import copied
    from neuronprune.latency import latency_table
    from neuronprune.retrain import fine_tune
    from neuronprune.sensitivity import sensitivity
    from neuronprune.surgery import apply
    rows = []
    for name in args.nets:
        for seed in range(args.seeds):
            learn, scores, xb = trained(name, seed, args.epochs)
            s = sensitivity(learn, scores, n=None)
            table = latency_table(learn.model, xb, scores.graph) if 'latency' in args.costs else None
            state = {k:v.clone() for k,v in learn.model.state_dict().items()}
            for of in args.costs:
                share = 1-(args.faster if of == 'latency' else args.sparsity)
                cost = cost_functions(learn, table, xb)[of]
                own = {f'by {by}':allocate(scores, 1-share, scope='budget', of=of, sensitivity=replace(s, by=by),
                                           latencies=table) for by in args.by}
                limit = 1.02*share*(table.ms if of == 'latency' else s.facts['macs'])
                masks = {**{k:(m, cost(m)) for k,m in own.items()},
                         **{k:at_cost(scores, k, cost, limit) for k in ('layer', 'global')}}
                for rule,(m,c) in masks.items():
                    learn.model.load_state_dict(state); learn.opt = None
                    cut = evaluate(apply(copied(learn.model), m), learn.dls.loaders[2])
                    fine_tune(learn, m, 1, seed=seed)
                    e = evaluate(learn.model, learn.dls.loaders[2])
                    rows.append(dict(net=name, of=of, seed=seed, rule=rule, cost=c/(1 if of == 'latency' else 1e6),
                                     k_cut=cut.k, cut_accuracy=cut.accuracy, k=e.k, n=e.n, accuracy=e.accuracy))
                    print(rows[-1], flush=True)
    df = pd.DataFrame(rows)
    for (name, of),d in df.groupby(['net', 'of'], sort=False):
        for value in ('cut_accuracy', 'accuracy'):
            print(f'\n{name}, equal {of}, {value}'); print(summary(d, value=value).to_string())
            rules = list(dict.fromkeys(d.rule))
            for own,other in itertools.combinations(rules[:-2], 2): print(paired(d, other, own, value=value))
            for own,other in itertools.product(rules[:-2], rules[-2:]): print(paired(d, own, other, value=value))

if __name__ == '__main__':
    args = options()
    print(platform.processor() or platform.machine(), os.cpu_count(), 'cores, load', os.getloadavg())
    if args.solver: solver()
    if args.met: met(args)
    if args.compare: compare(args)
    print('load', os.getloadavg())
