"""show_record.py PATH: print the record of a run as text, from its JSON file or from the executed notebook.

In a notebook the record is the text of the cell tagged `record`, without such a tag the last text output."""
import json, re, sys
from pathlib import Path

def text(cell):
    return [''.join(o['data']['text/plain']) for o in cell.get('outputs', []) if 'text/plain' in o.get('data', {})]

path = Path(sys.argv[1])
d = json.loads(path.read_text(encoding='utf-8'))
if 'cells' in d:
    tagged = [c for c in d['cells'] if 'record' in c['metadata'].get('tags', [])]
    found = [t for c in tagged or d['cells'] for t in text(c) if not re.match(r'<.*>$', t, re.S)]
    if not found: sys.exit(f'{path}: the run has no record')
    print(found[-1])
elif d:
    width = max(map(len, d))
    print('\n'.join(f'{k:{width}}  {v}' for k, v in d.items()))
else: sys.exit(f'{path}: the record is empty')
