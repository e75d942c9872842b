"""readme.py [--check]: make README.md, and the pictures it shows, from nbs/index.ipynb;
with --check only say what differs."""
import base64, json, re, sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->'

def directives(src): return dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', src, flags=re.M))

def relink(md):
    "Links of the notebook, which lies in nbs/, as seen from the root"
    def one(m):
        parts = []
        for p in PurePosixPath('nbs', m[2]).parts: parts = parts[:-1] if p == '..' else parts + [p]
        return m[1] + '/'.join(parts)
    return re.sub(r'(\]\(|src=")(?![a-z]+:|[#/])([^)\s"]+)', one, md)

def output(cell, i, o, pictures, alt):
    "One output as markdown: a picture, markdown, or plain text"
    data = o.get('data', {})
    if 'image/png' in data:
        name = f"nbs/images/readme-{cell['id']}-{i}.png"
        pictures[name] = base64.b64decode(''.join(data['image/png']))
        return f'![{alt}]({name})'
    if 'text/markdown' in data: return relink(''.join(data['text/markdown']).strip())
    text = ''.join(data.get('text/plain', o.get('text', '')) if o.get('name') != 'stderr' else '').rstrip()
    return text and f'```text\n{text}\n```'

def convert(nb):
    "Markdown of a notebook dictionary, and its pictures as name -> bytes"
    out, pictures = [NOTE], {}
    for cell in nb['cells']:
        src = ''.join(cell['source'])
        d = directives(src)
        if cell['cell_type'] == 'raw' or 'hide' in d or d.get('include') == 'false': continue
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if cell['cell_type'] == 'markdown': out.append(relink(src)); continue
        if src and d.get('echo') != 'false': out.append(f'```python\n{src}\n```')
        if d.get('output') != 'false': out += [output(cell, i, o, pictures, d.get('fig-alt', '')) for i,
                                               o in enumerate(cell['outputs'])]
    return '\n\n'.join(filter(None, out)) + '\n', pictures

def main(check):
    md, files = convert(json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8')))
    files = {'README.md': md.encode(), **files}
    stale = [str(p.relative_to(ROOT)) for p in (ROOT/'nbs/images').glob('readme-*.png')
             if str(p.relative_to(ROOT)) not in files]
    if check:
        differ = stale + [f for f, b in files.items() if not (ROOT/f).is_file() or (ROOT/f).read_bytes() != b]
        if differ: sys.exit(f"not what nbs/index.ipynb says: {', '.join(differ)}; run `make readme`")
        return
    for f in stale: (ROOT/f).unlink()
    for f, b in files.items():
        (ROOT/f).parent.mkdir(exist_ok=True)
        (ROOT/f).write_bytes(b)

if __name__ == '__main__': main('--check' in sys.argv[1:])
