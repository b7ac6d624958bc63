import runpy,re,sys
sys.argv=['x']
import torch
from moemamba.ops import cpu_scan
import moemamba.ops.cpu_scan as m
m._scan_backward._cache=None if False else m._scan_backward._cache
b,l,i,n=1,64,64,16
d=dict(u=torch.randn(b,l,i), dt=torch.randn(b,l,i)-2, A=-torch.rand(i,n)*8-.1, B=torch.randn(b,l,n), C=torch.randn(b,l,n), D=torch.randn(i), z=torch.randn(b,l,i), dt_bias=torch.randn(i)*.5)
d={k:v.requires_grad_() for k,v in d.items()}
y,s=cpu_scan.selective_scan(*d.values(),True,None,None)
y.sum().backward()
for k in (m._scan,m._scan_backward):
    asm=next(iter(k.inspect_asm().values()))
    from collections import Counter
    c=Counter()
    for line in asm.splitlines():
        mm=re.match(r'\s+(v\w+)\s',line)
        if mm: c[mm.group(1)+(' z' if 'zmm' in line else ' y' if 'ymm' in line else ' x')]+=1
    print(k.py_func.__name__,{k:v for k,v in c.most_common(60) if re.search('mul|add|fma|fm|round|rnd',k)})
