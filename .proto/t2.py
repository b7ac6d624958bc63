import torch
from moemamba.ops import reference, cpu_conv
def go(f,d,act,seq):
    d=[None if v is None else v.detach().clone().requires_grad_() for v in d]
    y,s=f(d[0],d[1],d[2],act,d[3],seq)
    g=torch.autograd.grad((y*torch.sin(torch.arange(y.numel()).view_as(y)*.1)).sum()+(s*torch.cos(torch.arange(s.numel()).view_as(s)*.3)).sum(),[v for v in d if v is not None],allow_unused=True)
    return [y,s,*g]
for b,l,i,k in ((2,100,70,4),(1,1,5,3),(2,63,64,1),(2,2,64,4)):
    for bf in (0,1):
        torch.manual_seed(0)
        x=torch.randn(b,l,i); 
        if bf: x=x.bfloat16()
        for seq in (None, torch.randint(-1,3,(b,l))):
            for act in ("silu",None):
                for st in (None, torch.randn(b,i,k-1)):
                    d=[x,torch.randn(i,k),torch.randn(i) if st is not None else None,st]
                    r=go(reference.causal_conv1d,d,act,seq); c=go(cpu_conv.causal_conv1d,d,act,seq)
                    print(b,l,i,k,bf,act,st is not None,seq is not None,[f"{((p-q).abs().max()/(p.abs().max()+1e-9)).item():.1e}" if p is not None and p.numel() else 'none' for p,q in zip(r,c)])
