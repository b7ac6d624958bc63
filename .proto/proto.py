import os, time, numpy as np, torch, numba
from numba import njit, types, carray
from numba.extending import intrinsic
from numba.core import cgutils
from llvmlite import ir

f32=np.float32
@intrinsic
def f32_to_bits(tc, x):
    def cg(ctx,b,sig,args): return b.bitcast(args[0], ir.IntType(32))
    return types.int32(types.float32), cg
@intrinsic
def bits_to_f32(tc, x):
    def cg(ctx,b,sig,args): return b.bitcast(args[0], ir.FloatType())
    return types.float32(types.int32), cg
@intrinsic
def pf32(tc, a):
    def cg(ctx,b,sig,args): return b.inttoptr(args[0], ir.FloatType().as_pointer())
    return types.CPointer(types.float32)(types.int64), cg
@intrinsic
def trunc(tc, x):
    def cg(ctx,b,sig,args): return b.fptosi(args[0], ir.IntType(32))
    return types.int32(types.float32), cg
@intrinsic
def tofloat(tc, x):
    def cg(ctx,b,sig,args): return b.sitofp(args[0], ir.FloatType())
    return types.float32(types.int32), cg

FM={'contract','nsz'}
C=[f32(v) for v in (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)]
C0,C1,C2,C3,C4=C
ONE=f32(1)
HALF=f32(.5)
LO=f32(-126)
@njit(fastmath=FM)
def exp2neg(x):
    x = x if x > LO else LO
    n = trunc(x - HALF)
    r = x - tofloat(n)
    q = C4*r+C3
    q = q*r+C2
    q = q*r+C1
    q = q*r+C0
    p = q*r+ONE
    return bits_to_f32(f32_to_bits(p) + (n << types.int32(23)))

T=int(os.environ.get('TILE',64)); K=32

def make(T, variant):
    @njit(fastmath=FM, nogil=True)
    def fwd(first, last, pu, pdt, pA, pB, pC, py, b, l, i, n):
        u_=carray(pf32(pu),(b,l,i)); dt_=carray(pf32(pdt),(b,l,i)); B=carray(pf32(pB),(b,l,n)); Cc=carray(pf32(pC),(b,l,n)); y_=carray(pf32(py),(b,l,i))
        A_=carray(pf32(pA),(i,n))
        h=np.zeros((n,T),f32); A=np.zeros((n,T),f32)
        U=np.zeros((K,T),f32); DT=np.zeros((K,T),f32); DU=np.zeros((K,T),f32); Y=np.zeros((K,T),f32)
        tiles=(i+T-1)//T
        for task in range(first,last):
            bb=task//tiles; c0=(task%tiles)*T; w=min(T,i-c0)
            for s in range(n):
                for c in range(w): A[s,c]=A_[c0+c,s]*f32(1.4426950408889634)
                for c in range(T): h[s,c]=f32(0)
            for t0 in range(0,l,K):
                m=min(K,l-t0)
                for t in range(m):
                    for c in range(w):
                        U[t,c]=u_[bb,t0+t,c0+c]; DT[t,c]=dt_[bb,t0+t,c0+c]
                    for c in range(T):
                        DU[t,c]=U[t,c]*DT[t,c]; Y[t,c]=f32(0)
                if variant==0:
                    for t in range(m):
                        for s in range(n):
                            Bt=B[bb,t0+t,s]; Ct=Cc[bb,t0+t,s]
                            for c in range(T):
                                v=exp2neg(DT[t,c]*A[s,c])*h[s,c]+DU[t,c]*Bt
                                h[s,c]=v
                                Y[t,c]+=Ct*v
                elif variant==1:
                    for s in range(n):
                        for t in range(m):
                            Bt=B[bb,t0+t,s]; Ct=Cc[bb,t0+t,s]
                            for c in range(T):
                                v=exp2neg(DT[t,c]*A[s,c])*h[s,c]+DU[t,c]*Bt
                                h[s,c]=v
                                Y[t,c]+=Ct*v
                else:
                    for t in range(m):
                        for s in range(0,n,4):
                            B0=B[bb,t0+t,s]; C0_=Cc[bb,t0+t,s]
                            B1=B[bb,t0+t,s+1]; C1_=Cc[bb,t0+t,s+1]
                            B2=B[bb,t0+t,s+2]; C2_=Cc[bb,t0+t,s+2]
                            B3=B[bb,t0+t,s+3]; C3_=Cc[bb,t0+t,s+3]
                            for c in range(T):
                                d=DT[t,c]; x=DU[t,c]
                                v=exp2neg(d*A[s,c])*h[s,c]+x*B0
                                h[s,c]=v; o=C0_*v
                                v=exp2neg(d*A[s+1,c])*h[s+1,c]+x*B1
                                h[s+1,c]=v; o+=C1_*v
                                v=exp2neg(d*A[s+2,c])*h[s+2,c]+x*B2
                                h[s+2,c]=v; o+=C2_*v
                                v=exp2neg(d*A[s+3,c])*h[s+3,c]+x*B3
                                h[s+3,c]=v; o+=C3_*v
                                Y[t,c]+=o
                for t in range(m):
                    for c in range(w): y_[bb,t0+t,c0+c]=Y[t,c]
    return fwd

b,l,i,n=8,256,512,16
torch.manual_seed(0)
u=torch.randn(b,l,i); dt=torch.rand(b,l,i)*.1+.001; A=-torch.rand(i,n)*16-.5; B=torch.randn(b,l,n); Cc=torch.randn(b,l,n)
ref=None
for T in (16,32,64,128,256):
  for variant in (0,1,2):
    y=torch.full((b,l,i),float('nan'))
    f=make(T,variant)
    args=[x.data_ptr() for x in (u,dt,A,B,Cc,y)]+[b,l,i,n]
    t=time.time(); f(0,0,*args); tc=time.time()-t
    nt=b*((i+T-1)//T)
    ts=[]
    for _ in range(7):
        t=time.perf_counter(); f(0,nt,*args); ts.append(time.perf_counter()-t)
    if ref is None:
        from moemamba.ops import reference
        with torch.no_grad(): ref,_=reference.selective_scan(u.double(),dt.double(),A.double(),B.double(),Cc.double(),None,None,None,False,None,None)
    asm=next(iter(f.inspect_asm().values()))
    print(T,variant,'compile %.2f'%tc,'min %.2f ms'%(min(ts)*1e3), 'cycles/16upd %.2f'%(min(ts)*2.6e9/(b*l*i*n/16)), (y-ref).abs().max().item(), asm.count('zmm'), asm.count('ymm'), flush=True)
