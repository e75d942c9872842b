"""An installed package, away from the clone: the command, a study, both pages; the front door."""
import json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest
from neuronprune import cli

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def away(tmp_path_factory):
    "(folder of the installed package, an empty folder to work in)."
    d = tmp_path_factory.mktemp('wheel')
    src = d/'src'; src.mkdir()
    for o in ('neuronprune', 'setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE',
              'CHANGELOG.md'):
        (shutil.copytree if (ROOT/o).is_dir() else shutil.copy)(ROOT/o, src/o)
    (src/'nbs').mkdir()
    for o in ('experiments', 'comparison'): shutil.copy(ROOT/'nbs'/f'{o}.ipynb', src/'nbs')
    build = 'from setuptools import build_meta; print(build_meta.build_wheel("out"))'
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', build], cwd=src, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    whl, = (src/'out').glob('*.whl')
    with zipfile.ZipFile(whl) as z: z.extractall(d/'site')
    (d/'work').mkdir()
    return d/'site', d/'work'

def run(away, *args):
    env = {**os.environ, 'PYTHONPATH': str(away[0]), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    return subprocess.run([sys.executable, *args], cwd=away[1], env=env, capture_output=True, text=True, timeout=300)

def test_what_travels(away):
    site, _ = away
    assert (site/'neuronprune'/'py.typed').exists() and {o.stem for o in (site/'neuronprune'/'pages').iterdir()} == {
        'experiments', 'comparison'}
    assert 'neuronprune = neuronprune.cli:main' in next(site.glob('*.dist-info/entry_points.txt')).read_text()
    assert str(site) in run(away, '-c', 'import neuronprune; print(neuronprune.__file__)').stdout

TOY = '''
about: Two methods on a few of the digits.
model: lenet300
epochs: 2
n_train: 200
fine_tune_epochs: 1
sizes: [0.5, 0.2]
methods: [magnitude, random]
'''

def test_a_study_its_page_and_a_run(away):
    "The command runs a file, papermill renders it from what is there, `page` makes one run, `show` tells of both."
    site, work = away
    (work/'toy.yml').write_text(TOY)
    r = run(away, '-m', 'neuronprune', 'run', 'toy.yml', '-p', 'seed=1')
    assert r.returncode == 0 and '2 runs, 0 failed' in r.stdout, r.stdout + r.stderr
    assert len(list((work/'runs').glob('study-*/rows.csv'))) == 1
    then = {p:p.stat().st_mtime_ns for p in (work/'runs').glob('*/size*')}
    r = run(away, '-m', 'papermill', str(site/'neuronprune'/'pages'/'comparison.ipynb'), 'out.ipynb', '-f', 'toy.yml',
            '-p', 'seed', '1', '--no-progress-bar', '-k', 'python3')
    assert r.returncode == 0 and 'PR' in (work/'out.ipynb').read_text(), r.stderr[-2000:]
    assert then and then == {p:p.stat().st_mtime_ns for p in (work/'runs').glob('*/size*')}
    r = run(away, '-m', 'neuronprune', 'page', 'magnitude', '-p', 'model=lenet300', '-p', 'epochs=1', '-p',
            'n_train=200')
    page = work/r.stdout.split('\n')[-2].strip()
    assert r.returncode == 0 and page.name == 'page.ipynb' and 'after fine-tuning' in page.read_text(), r.stderr
    shown = run(away, '-m', 'neuronprune', 'show').stdout
    assert 'magnitude 0.5' in shown and 'page.ipynb' in shown

def said(monkeypatch, capsys, folder, *args):
    "(exit status, text) of the command in this process."
    monkeypatch.setattr(sys, 'argv', ['neuronprune', *args]); monkeypatch.chdir(folder); code = 0
    try: cli.main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if isinstance(e.code, str): print(e.code)
    return code, ''.join(capsys.readouterr())

@pytest.mark.parametrize('args,code,words', [
    ([], 0, 'usage'), (['--help'], 0, 'usage'), (['rum'], 1, "'rum'; expected one of run, page"), (['run'], 2,
                                                                                                   'required: file'),
    (['run', 'none.yml'], 2, 'none.yml'), (['page', 'magnitud'], 2, "did you mean 'magnitude'"),
    (['page', 'random', '-p', 'seed'], 2, 'expected name=value'),
    (['page', 'random', '-p', 'sede=1'], 2, "did you mean 'seed'"),
    (['show', 'nowhere'], 2, 'nowhere'), (['show', '.'], 2, 'no runs there'), (['methods'], 0, 'Liebenwein')])
def test_what_the_command_says(monkeypatch, capsys, tmp_path, args, code, words):
    got, text = said(monkeypatch, capsys, tmp_path, *args)
    assert got == code and words in text and 'Traceback' not in text

def test_a_failed_run_is_the_exit_status(monkeypatch, capsys, tmp_path):
    (tmp_path/'bad.yml').write_text(TOY + 'tune_args: {lr: 1.0e+30}\n')
    code, text = said(monkeypatch, capsys, tmp_path, 'run', 'bad.yml')
    assert code == 1 and '2 runs, 2 failed' in text and re.search('magnitude, seed 0: .*loss is', text), text

@pytest.mark.parametrize('args,code', [(['--help'], 0), (['rum'], 1), (['run', 'none.yml'], 2), (['show', 'none'], 2),
                                       (['page', 'random', '-p', 'seed'], 2)])
def test_what_needs_no_torch_is_said_at_once(away, args, code):
    main = f"import sys; sys.argv[1:] = {args}; import neuronprune.cli as c, atexit; atexit.register("
    r = run(away, '-c', main + "lambda: print('torch' in sys.modules)); c.main()")
    assert r.returncode == code and r.stdout.split()[-1] == 'False' and 'Traceback' not in r.stderr

def test_the_front_door(away):
    code = '''
import sys, neuronprune as n
assert 'torch' not in sys.modules and len(dir(n)) < 30, dir(n)
import inspect
for k in dir(n):
    if not k.startswith('__'): assert callable(getattr(n, k)) and getattr(n, k).__doc__, k
from neuronprune.allocate import allocate
assert n.allocate.ratios and inspect.signature(n.allocate) == inspect.signature(allocate)
print(n.job('magnitude').id)
'''
    r = run(away, '-c', code); assert r.returncode == 0 and r.stdout.startswith('magnitude-'), r.stderr
