"""CPU seconds of `import torch` and of each import of the package, in fresh interpreters, and the ratio of the two.

    python benchmarks/imports.py --repeats 3

Every import is timed together with torch's, which it needs: 1.0 is torch alone.
The runs are interleaved, torch's own in
every round, so that a busy machine slows all of them; printed are medians over the rounds.
The first round is a warm-up.
"""
import argparse, statistics, subprocess, sys

IMPORTS = ['import neuronprune.graph', 'import neuronprune.allocate', 'import neuronprune.surgery',
           *(f'from neuronprune.{o} import score' for o in ('mip', 'mint')),
           *(f'import neuronprune.{o}' for o in ('provable', 'baselines', 'lowrank', 'criteria', 'sampling', 'models')),
           'import fastai.learner', 'import neuronprune.data', 'import neuronprune.train', 'import neuronprune.all']

def cpu_seconds(statement):
    "User and system time of a fresh interpreter, all threads, from before the statement to after it."
    code = f"import time; start = time.process_time(); {statement}; print(time.process_time()-start)"
    return float(
        subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, capture_output=True, text=True).stdout)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=3, help='rounds')
    todo = ['import torch', *IMPORTS]
    secs = [{o: cpu_seconds(o) for o in todo} for _ in range(p.parse_args().repeats+1)][1:]
    print(f"{'CPU s':>6} {'x torch':>8}")
    for o in todo:
        print(f"{statistics.median(r[o] for r in secs):6.2f} "
              f"{statistics.median(r[o]/r['import torch'] for r in secs):8.2f}  {o}")

if __name__ == '__main__': main()
