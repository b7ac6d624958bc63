import sys,time,re
import numpy as np, torch, numba
from numba import types, carray
from numba.core import cgutils
from numba.extending import intrinsic
from llvmlite import ir
import inspect
src=open('src/moemamba/ops/cpu_scan.py').read()
variant=sys.argv[1]
import moemamba.ops.cpu_kernel as K
@intrinsic
def stack(tc):
    def cg(ctx,b,sig,args):
        p=cgutils.alloca_once(b, ir.ArrayType(ir.FloatType(),64)); return b.bitcast(p, ir.FloatType().as_pointer())
    return types.CPointer(types.float32)(), cg
K.stack=stack
def row():
    pass
if variant!='base':
    src=src.replace('    vectors = np.zeros((9, TILE), np.float32)\n','    vectors = np.zeros((9, TILE), np.float32)\n')
    src=re.sub(r'    skip, bias, drive, g, gate = .*\n    dx, dstep, dskip, dbias = .*\n', ''.join(f'    {v} = carray(stack(), 64)\n' for v in 'skip bias drive g gate dx dstep dskip dbias xrow srow'.split()), src)
    src=src.replace('''        load_columns(vectors[1:2], dt_bias, channel, count)
        ddecay''','''        load_columns(vectors[1:2], dt_bias, channel, count)
        skip[:]=vectors[0]; bias[:]=vectors[1]; g[:]=0; dskip[:]=0; dbias[:]=0
        ddecay''')
    src=src.replace("from .cpu_kernel import (","from moemamba.ops.cpu_kernel import stack\nfrom numba import carray\nfrom .cpu_kernel import (")
if variant=='two':
    src=src.replace('''                        ddecay[s, c] += through * step[j, c]
                        dstep[c] += through * decay[s, c]
''','''                        gate[c] = through
                    for c in range(TILE):
                        ddecay[s, c] += gate[c] * step[j, c]
                        dstep[c] += gate[c] * decay[s, c]
''')

src=src.replace('moemamba::cpu','moemamba::x'+variant)
f='/tmp/wt/cpu/.proto/x_'+variant+'.py'
open(f,'w').write(src.replace('from .cpu_kernel','from moemamba.ops.cpu_kernel'))
import importlib.util
spec=importlib.util.spec_from_file_location('x',f); m=importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
b,l,i,n=8,256,512,16
torch.manual_seed(0)
d=dict(u=torch.randn(b,l,i), dt=torch.randn(b,l,i)-2, A=-torch.rand(i,n)*8-.1, B=torch.randn(b,l,n), C=torch.randn(b,l,n), D=torch.randn(i), z=torch.randn(b,l,i), dt_bias=torch.randn(i)*.5)
d={k:v.requires_grad_() for k,v in d.items()}
torch.set_num_threads(1)
y,s=m.selective_scan(*d.values(),True,None,None)
g=torch.randn_like(y)
ts=[]
for _ in range(15):
    t=time.perf_counter(); gr=torch.autograd.grad(y,list(d.values()),g,retain_graph=True); ts.append(time.perf_counter()-t)
from collections import Counter
c=Counter()
for line in next(iter(m._scan_backward.inspect_asm().values())).splitlines() if m._scan_backward.signatures else []:
    mm=re.match(r'\s+(v\w+)\s',line)
    if mm: c[mm.group(1)+(' z' if 'zmm' in line else ' y' if 'ymm' in line else ' x')]+=1
print(variant,'bwd min %.2f med %.2f'%(min(ts)*1e3,sorted(ts)[7]*1e3),[x.sum().item() for x in gr[:4]],{k:v for k,v in c.most_common(60) if re.search('mul|add|fma|fm|round|rnd',k)})
