import time, torch
from moemamba.ops import cpu_scan
torch.set_num_threads(1)
def mk(b,l,i,n):
    torch.manual_seed(1)
    return dict(u=torch.randn(b,l,i), dt=torch.randn(b,l,i)-2, A=-torch.rand(i,n)*8-.1, B=torch.randn(b,l,n), C=torch.randn(b,l,n), D=torch.randn(i), z=torch.randn(b,l,i), dt_bias=torch.randn(i)*.5)
def t(name,d,sp):
    d={k:None if v is None else v.requires_grad_() for k,v in d.items()}
    y,s=cpu_scan.selective_scan(*d.values(),sp,None,None); g=torch.randn_like(y)
    bw=[];fw=[]
    for _ in range(15):
        t0=time.perf_counter(); torch.autograd.grad(y,[v for v in d.values() if v is not None],g,retain_graph=True); bw.append(time.perf_counter()-t0)
        t0=time.perf_counter(); cpu_scan.selective_scan(*d.values(),sp,None,None); fw.append(time.perf_counter()-t0)
    print(name,'fwd %.2f bwd %.2f'%(min(fw)*1e3,min(bw)*1e3))
for shape in ((8,256,512,16),(8,256,512,1),(64,32,512,16),(128,256,64,16),(128,256,64,1)):
    d=mk(*shape); t(f'{shape} full',d,True)
    d=mk(*shape); d['z']=None; t('no z',d,True)
    d=mk(*shape); d['z']=None; d['dt']=d['dt'].sigmoid(); t('no z no softplus',d,False)
