import numpy as np, numba, time, sys
from moemamba.ops.cpu_kernel import exp2, FAST
T=64; CH=32; f32=np.float32
Z=f32(0)
def rec(h,a,x,step,drive,decay,Bt,Ct,out,m,n):
    for j in range(m):
        for c in range(T): drive[c]=step[j,c]*x[j,c]; out[j,c]=Z
        for s in range(n):
            for c in range(T):
                a[j,s,c]=exp2(step[j,c]*decay[s,c])
                h[j+1,s,c]=a[j,s,c]*h[j,s,c]+drive[c]*Bt[j,s]
                out[j,c]+=Ct[j,s]*h[j+1,s,c]
def rev(h,a,x,step,g,drive,decay,Bt,Ct,dh,ddecay,dx,dstep,dB,dC,m,n):
    for j in range(m-1,-1,-1):
        for c in range(T):
            drive[c]=step[j,c]*x[j,c]; dx[c]=Z; dstep[c]=Z
        for s in range(n):
            dBt=dCt=Z
            for c in range(T):
                dhc=dh[s,c]+g[c]*Ct[j,s]
                dCt+=g[c]*h[j+1,s,c]
                dBt+=dhc*drive[c]
                dx[c]+=dhc*Bt[j,s]
                dhc*=a[j,s,c]
                dh[s,c]=dhc
                th=dhc*h[j,s,c]
                ddecay[s,c]+=th*step[j,c]
                dstep[c]+=th*decay[s,c]
            dB[j,s]=dBt; dC[j,s]=dCt
# split: pass 1 over (s,c): dh chain, stored; pass 2 products
def rev2(h,a,x,step,g,drive,decay,Bt,Ct,dh,ddecay,dx,dstep,dB,dC,m,n):
    tmp=np.empty(T,f32)
    for j in range(m-1,-1,-1):
        for c in range(T):
            drive[c]=step[j,c]*x[j,c]; dx[c]=Z; dstep[c]=Z
        for s in range(n):
            dBt=dCt=Z
            b_=Bt[j,s]; c_=Ct[j,s]
            for c in range(T):
                dhc=dh[s,c]+g[c]*c_
                dCt+=g[c]*h[j+1,s,c]
                dBt+=dhc*drive[c]
                tmp[c]=dhc
            for c in range(T): dx[c]+=tmp[c]*b_
            for c in range(T): 
                tmp[c]*=a[j,s,c]
                dh[s,c]=tmp[c]
            for c in range(T): tmp[c]*=h[j,s,c]
            for c in range(T): ddecay[s,c]+=tmp[c]*step[j,c]
            for c in range(T): dstep[c]+=tmp[c]*decay[s,c]
            dB[j,s]=dBt; dC[j,s]=dCt
def row1(dh,g,h1,drive,dx,a,h0,ddecay,step,dstep,decay,b_,c_):
    dBt=dCt=Z
    for c in range(T):
        dhc=dh[c]+g[c]*c_
        dCt+=g[c]*h1[c]
        dBt+=dhc*drive[c]
        dx[c]+=dhc*b_
        dhc*=a[c]
        dh[c]=dhc
        th=dhc*h0[c]
        ddecay[c]+=th*step[c]
        dstep[c]+=th*decay[c]
    return dBt,dCt
jrow=numba.njit(fastmath=FAST|{'reassoc'})(row1)
def rev3(h,a,x,step,g,drive,decay,Bt,Ct,dh,ddecay,dx,dstep,dB,dC,m,n):
    for j in range(m-1,-1,-1):
        for c in range(T):
            drive[c]=step[j,c]*x[j,c]; dx[c]=Z; dstep[c]=Z
        for s in range(n):
            dB[j,s],dC[j,s]=jrow(dh[s],g,h[j+1,s],drive,dx,a[j,s],h[j,s],ddecay[s],step[j],dstep,decay[s],Bt[j,s],Ct[j,s])
n=16
rng=np.random.default_rng(0)
R=lambda *s: rng.standard_normal(s).astype(f32)*f32(.1)
h=R(CH+1,n,T);a=R(CH,n,T);x=R(CH,T);step=abs(R(CH,T));drive=R(T);decay=-abs(R(n,T));Bt=R(CH,n);Ct=R(CH,n);out=R(CH,T);g=R(T);dh=R(n,T);dd=R(n,T);dx=R(T);ds=R(T);dB=R(CH,n);dC=R(CH,n)
J=lambda f: numba.njit(fastmath=FAST|{'reassoc'},error_model='numpy',nogil=True)(f)
def timeit(name,f,*args):
    f(*args)
    ts=[]
    for _ in range(200):
        t=time.perf_counter(); f(*args); ts.append(time.perf_counter()-t)
    print(name,'%.1f us  total for 8x256x512: %.2f ms'%(min(ts)*1e6,min(ts)*1e3*64*8))
timeit('rec',J(rec),h,a,x,step,drive,decay,Bt,Ct,out,CH,n)
for nm,f in (('rev',rev),('rev2',rev2),('rev3',rev3)):
    timeit(nm,J(f),h,a,x,step,g,drive,decay,Bt,Ct,dh,dd,dx,ds,dB,dC,CH,n)
