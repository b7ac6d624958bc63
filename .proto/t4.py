import time, torch
from moemamba.ops import cpu_scan
torch.set_num_threads(1)
import resource
acc={}
orig=cpu_scan.run
last=[]
def run(k,*a):
    f0=resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    t=time.perf_counter(); orig(k,*a); dt=time.perf_counter()-t
    acc.setdefault(k.py_func.__name__,[]).append((dt*1e3,resource.getrusage(resource.RUSAGE_SELF).ru_minflt-f0))
    last.append((k,a))
cpu_scan.run=run
def mk(b,l,i,n):
    torch.manual_seed(1)
    return dict(u=torch.randn(b,l,i), dt=torch.randn(b,l,i)-2, A=-torch.rand(i,n)*8-.1, B=torch.randn(b,l,n), C=torch.randn(b,l,n), D=torch.randn(i), z=torch.randn(b,l,i), dt_bias=torch.randn(i)*.5)
for shape in ((8,256,512,16),(8,256,512,1)):
    d={k:v.requires_grad_() for k,v in mk(*shape).items()}
    acc.clear()
    for _ in range(12):
        y,s=cpu_scan.selective_scan(*d.values(),True,None,None)
        torch.autograd.grad(y,list(d.values()),torch.ones_like(y),retain_graph=True)
    for k,v in acc.items(): print(shape,k,'min %.2f'%min(x[0] for x in v),'faults',sorted(x[1] for x in v)[6])
