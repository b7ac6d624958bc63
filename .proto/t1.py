import time, torch, sys
from moemamba.ops import reference, cpu_scan
torch.manual_seed(0)
def mk(b,l,i,n):
    torch.manual_seed(1)
    d=dict(u=torch.randn(b,l,i), dt=torch.randn(b,l,i)-2, A=-torch.rand(i,n)*8-.1, B=torch.randn(b,l,n), C=torch.randn(b,l,n), D=torch.randn(i), z=torch.randn(b,l,i), dt_bias=torch.randn(i)*.5)
    st=torch.randn(b,i,n)
    return d,st
def go(f,d,st,seq):
    d={k:v.detach().clone().requires_grad_() for k,v in d.items()}; st=st.detach().clone().requires_grad_()
    y,s=f(*d.values(),True,st,seq)
    g=torch.autograd.grad((y*torch.sin(torch.arange(y.numel()).view_as(y)*.1)).sum()+(s*torch.cos(torch.arange(s.numel()).view_as(s)*.3)).sum(),[*d.values(),st])
    return dict(y=y,s=s,**dict(zip([*d,'state'],g)))
for b,l,i,n in ((2,100,70,16),(1,1,5,1),(2,63,64,5)):
    d,st=mk(b,l,i,n)
    for seq in (None, torch.randint(-1,3,(b,l)).to(torch.int32)):
        r=go(reference.selective_scan,d,st,seq); c=go(cpu_scan.selective_scan,d,st,seq)
        print(b,l,i,n,seq is not None,{k:f"{((r[k]-c[k]).abs().max()/(r[k].abs().max()+1e-9)).item():.1e}" for k in r})
b,l,i,n=8,256,512,16
d,st=mk(b,l,i,n)
for th in (1,2):
    torch.set_num_threads(th)
    with torch.no_grad():
        f=[]
        for _ in range(9):
            t=time.perf_counter(); cpu_scan.selective_scan(*d.values(),True,None,None); f.append(time.perf_counter()-t)
    d={k:v.requires_grad_() for k,v in d.items()}
    bw=[];ff=[]
    for _ in range(9):
        t=time.perf_counter(); y,s=cpu_scan.selective_scan(*d.values(),True,None,None); ff.append(time.perf_counter()-t)
        g=torch.randn_like(y)
        t=time.perf_counter(); torch.autograd.grad(y,list(d.values()),g); bw.append(time.perf_counter()-t)
    print('threads',th,'fwd %.2f ms fwd+save %.2f bwd %.2f'%(min(f)*1e3,min(ff)*1e3,min(bw)*1e3))
