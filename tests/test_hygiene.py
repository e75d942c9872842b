"""What keeps the tree in order: the notebooks as files, the modules made from them, the front page, the metadata.

Every check looks at what is there, so a notebook that is not written yet breaks nothing."""
import ast, builtins, dis, importlib, json, re, subprocess, sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from types import CodeType
import pytest, yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT/'nbs', ROOT/'neuronprune'
BOOKS = sorted(str(p.relative_to(NBS)) for p in NBS.rglob('*.ipynb')
               if not any(q.startswith(('.', '_')) for q in p.relative_to(NBS).parts))
PAPERS, TUTORIALS = ([b for b in BOOKS if b.startswith(f'{o}/')] for o in ('papers', 'tutorials'))
MODULES = sorted(p.stem for p in LIB.glob('*.py') if not p.stem.startswith('_'))
GROUND = {'core', 'door', 'files', 'kinds', 'datasets', 'data', 'probe', 'graph', 'masks', 'allocate', 'evaluation',
          'train', 'retrain', 'ranks', 'distill', 'regularize', 'blocks', 'draws', 'inputs', 'saliency'}
METHODS = set('baselines mip provable mint energy anneal lowrank criteria sampling'.split())
PATHS = re.compile(r'(?<![\w.])/(?:work|root|tmp|home|Users|opt)/[\w.+-]+')
BARS = re.compile(r'<progress|progress-bar|jupyter-widgets|widget-view|\d%\|[█▏ ]')
WIDTH = 120 # columns of a line of code
# Books a reader starts from: their first cell needs no `> sentence`
FRONT = {'index.ipynb', 'experiments.ipynb'}
RUNS = {'experiments.ipynb', 'comparison.ipynb'} # pages of runs

each_book = pytest.mark.parametrize('book', BOOKS)
each_paper = pytest.mark.parametrize('book', PAPERS or [pytest.param('', marks=pytest.mark.skip('no papers yet'))])
each_module = pytest.mark.parametrize('module', MODULES)

@cache
def read(book): return json.loads((NBS/book).read_text(encoding='utf-8'))
def cells(book, kind='code'): return [c for c in read(book)['cells'] if kind in (None, c['cell_type'])]
def source(c): return ''.join(c['source'])
def flag(c, name): return re.search(rf'^#\|\s*{name}\b', source(c), re.M)
def outputs(book): return [(c['id'], o) for c in cells(book) for o in c['outputs']]
def shown(o):
    "All text of an output, pictures left out"
    data = {'': o.get('text', ''),
            **{k: v for k, v in o.get('data', {}).items() if not k.startswith('image/') or 'svg' in k}}
    return '\n'.join(v if isinstance(v, str) else ''.join(v) if isinstance(v, list) else json.dumps(v)
                     for v in data.values())
def parameters(book): return [c for c in cells(book) if 'parameters' in c['metadata'].get('tags', [])]

def settings():
    c = ConfigParser(delimiters=['='])
    c.read(ROOT/'settings.ini', encoding='utf-8')
    return c['DEFAULT']

# The notebooks as files

def test_there_are_notebooks(): assert BOOKS and MODULES

@each_book
def test_format(book):
    nb = read(book)
    assert (nb['nbformat'], nb['nbformat_minor']) == (4, 5)
    assert nb['metadata']['kernelspec']['name'] == 'python3'
    assert nb['metadata']['kernelspec']['language'] == 'python', 'papermill reads the language here'

@each_book
def test_cell_ids(book):
    ids = [c.get('id') for c in cells(book, None)]
    assert not [i for i in ids if not (isinstance(i, str) and re.fullmatch(r'[A-Za-z0-9_-]{1,64}', i))]
    assert not {i for i in ids if ids.count(i) > 1}

@each_book
def test_outputs_are_quiet(book):
    assert not [i for i, o in outputs(book) if o['output_type'] == 'error'], 'a stored error'
    assert not [i for i, o in outputs(book) if o.get('name') == 'stderr'], 'stored warnings'
    assert not [i for i, o in outputs(book) if BARS.search(shown(o))], 'a stored progress bar'

@each_book
def test_no_machine_paths(book):
    text = [(c['id'], source(c)) for c in cells(book, None)] + [(i, shown(o)) for i, o in outputs(book)]
    assert not [(i, m[0]) for i, s in text for m in PATHS.finditer(s)]

@each_book
def test_first_cell(book):
    c = cells(book, None)[0]
    assert c['cell_type'] == 'markdown' and source(c).startswith('# ')
    assert book in FRONT or re.search(r'^> \S', source(c), re.M), 'the sentence that becomes the docstring'

@each_book
def test_exported_cells_are_short(book):
    sizes = {c['id']: sum(bool(o.strip()) and not o.startswith(('#|', '@public')) for o in source(c).splitlines())
             for c in cells(book) if flag(c, 'export')}
    assert not {k: n for k, n in sizes.items() if n > 40}

@each_book
def test_code_is_narrow(book):
    assert not [(c['id'], len(l)) for c in cells(book) for l in source(c).splitlines() if len(l) > WIDTH]

@each_book
def test_parameters_are_literals(book):
    found = parameters(book)
    assert len(found) == 1 if book == 'experiments.ipynb' else len(found) <= 1
    for node in [n for c in found for n in ast.parse(source(c)).body]:
        assert isinstance(node, (ast.Assign, ast.AnnAssign)), ast.unparse(node)
        ast.literal_eval(node.value)

@each_book
def test_in_sidebar(book):
    if '/' in book: return
    bar = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']
    assert f'"{book}"' in json.dumps(bar)

@each_paper
def test_paper_has_a_quick_form(book):
    assert any(re.search(r'^smoke\s*=', source(c), re.M) for c in parameters(book))

@pytest.mark.parametrize('book', PAPERS + TUTORIALS)
def test_page_was_run(book):
    assert (NBS/book).with_name('.notest').is_file()
    code = [c for c in cells(book) if source(c).strip() and not flag(c, 'hide')]
    assert sum(bool(c['outputs']) for c in code) >= len(code)/3

def test_tutorials_come_first():
    bar = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    assert bar[1]['section'] == 'Tutorials' and sorted(bar[1]['contents']) == TUTORIALS

@pytest.mark.parametrize('book', PAPERS + TUTORIALS + [b for b in BOOKS if b in RUNS])
def test_imported_names_exist(book):
    for c in cells(book):
        src = re.sub(r'^\s*[%!].*$', 'pass', source(c), flags=re.M)
        for n in ast.walk(ast.parse(src)):
            if isinstance(n, ast.Import):
                [importlib.import_module(a.name) for a in n.names if a.name.startswith('neuronprune')]
            if not (isinstance(n, ast.ImportFrom) and (n.module or '').startswith('neuronprune')): continue
            mod = importlib.import_module(n.module)
            for a in n.names:
                if a.name != '*' and not hasattr(mod, a.name): importlib.import_module(f'{n.module}.{a.name}')

# The modules

def codes(code):
    yield code
    for o in code.co_consts:
        if isinstance(o, CodeType): yield from codes(o)

@each_module
def test_global_names_exist(module):
    code, own = compile((LIB/f'{module}.py').read_text(encoding='utf-8'), module, 'exec'), vars(builtins)
    names = {i.argval for c in codes(code) for i in dis.get_instructions(c) if i.opname == 'LOAD_GLOBAL'}
    assert not names - own.keys() - vars(importlib.import_module(f'neuronprune.{module}')).keys()

def exported(book):
    return next((m[1] for c in cells(book) if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M))), None)

@each_module
def test_module_comes_from_a_notebook(module):
    text = (LIB/f'{module}.py').read_text(encoding='utf-8')
    m = re.search(r'^# AUTOGENERATED! DO NOT EDIT! File to edit: \.\./nbs/(\S+)\.$', text, re.M)
    assert m and m[1] in BOOKS and exported(m[1]) == module

def test_every_exporting_notebook_has_its_module():
    assert sorted(filter(None, map(exported, BOOKS))) == MODULES

def test_nothing_else_is_code():
    assert (sorted(str(p.relative_to(LIB)) for p in LIB.rglob('*.py'))
            == sorted(['__init__.py', '__main__.py', '_modidx.py', *(f'{m}.py' for m in MODULES)]))

FILES = sorted(str(p.relative_to(ROOT)) for d in ('neuronprune', 'tests', 'benchmarks', 'scripts')
               for p in (ROOT/d).glob('*.py') if p.name != '_modidx.py')

@pytest.mark.parametrize('file', FILES)
def test_files_are_narrow(file):
    "`__all__` and a chapter's sentence are set by nbdev, and so are their line breaks."
    own = r'^(__all__ = \[.*?\]|""".*?""")'
    text = re.sub(own, '', (ROOT/file).read_text(encoding='utf-8'), count=2, flags=re.M | re.S)
    assert not [l for l in text.splitlines() if len(l) > WIDTH]

@each_module
def test_modidx(module):
    d, cfg = importlib.import_module('neuronprune._modidx').d, settings()
    tree = ast.parse((LIB/f'{module}.py').read_text(encoding='utf-8'))
    defined = {f'neuronprune.{module}.{n.name}' for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
               and not any(getattr(o, 'id', getattr(getattr(o, 'func', o), 'id', '')).startswith('patch')
                           for o in n.decorator_list)}
    listed = d['syms'][f'neuronprune.{module}']
    assert defined <= set(listed)
    assert {f for _, f in listed.values()} <= {f'neuronprune/{module}.py'}
    assert set(d['syms']) == {f'neuronprune.{m}' for m in MODULES}
    assert all(cfg[k].replace('%(user)s', cfg['user']) == v for k, v in d['settings'].items())

@pytest.mark.parametrize('module', sorted(METHODS & set(MODULES)))
def test_method_stands_on_the_ground_only(module):
    tree = ast.parse((LIB/f'{module}.py').read_text(encoding='utf-8'))
    names = [n.module or '' for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    inner = {n.split('.')[1] if '.' in n else n for n in names if n.split('.')[0] == 'neuronprune'}
    inner |= {n.module or n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert {o for o in inner if not o.startswith(f'{module}_')} <= GROUND, (
        'a method may have chapters of its own, named after it')

# The front page and the metadata

def test_readme_is_what_index_says():
    if 'index.ipynb' not in BOOKS: pytest.skip('no index yet')
    r = subprocess.run([sys.executable, 'scripts/readme.py', '--check'], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    assert len((ROOT/'README.md').read_text(encoding='utf-8').splitlines()) <= 150

def test_readme_links():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'(?:\]\(|src=")(?![a-z]+:|#)([^)\s"#]+)', text)
    assert not [o for o in links if not (ROOT/o).exists()]

def test_no_machine_paths_in_text():
    files = [p for g in ('*.md', '*.cff', '*.ini', '*.toml', '*.yml', 'Makefile', '.ci/*', '.github/**/*',
                         'neuronprune/*.py', 'scripts/*.py', 'nbs/params/**/*')
             for p in ROOT.glob(g) if p.is_file()]
    assert not [(p.name, m[0]) for p in files for m in PATHS.finditer(p.read_text(encoding='utf-8'))]

def test_quarto_settings_are_one():
    assert (ROOT/'_quarto.yml').read_bytes() == (NBS/'_quarto.yml').read_bytes()

def test_settings():
    cfg = settings()
    needs = {k: [Requirement(o) for o in cfg[k].split()] for k in cfg if k.endswith('requirements')}
    assert needs['requirements'] and needs['dev_requirements']
    tools = {o.name for o in needs['requirements']} & {'nbdev', 'execnb', 'pytest'}
    assert not tools, 'development tools belong to the dev extra'
    assert cfg['allowed_cell_metadata_keys'].split() == ['tags'], 'without it nbdev_clean drops the parameters tag'

def test_one_version():
    v = settings()['version']
    assert f'__version__ = "{v}"' in (LIB/'__init__.py').read_text(encoding='utf-8')
    assert yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))['version'] == v
    assert f'## {v}' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
