import numpy as np, numba, time, torch
from moemamba.ops.cpu_kernel import *
from moemamba.ops.cpu_kernel import FAST
from moemamba.ops.cpu_scan import _load_step
T=64;f32=np.float32; ONE=f32(1); Z=f32(0)
J=lambda f: numba.njit(fastmath=FAST|{'reassoc'},error_model='numpy',nogil=True)(f)
N=2000
t_=torch.randn(8,256,512); R=rows(t_)
v=np.random.randn(9,64).astype(f32); out=np.random.randn(32,64).astype(f32)
@J
def k_read(N,R,v,out):
    for i in range(N): read(out[i%32],R,0,i%256,0,64)
@J
def k_write(N,R,v,out):
    for i in range(N): write(v[2],R,0,i%256,0,64)
@J
def k_step(N,R,v,out):
    for i in range(N): _load_step(out[i%32],v[1],True)
@J
def k_slope(N,R,v,out):
    bias=v[0]
    for i in range(N):
        j=i%32
        for c in range(T): v[3,c]=sigmoid(out[j,c]+bias[c])
@J
def k_silu(N,R,v,out):
    x=v[2];o=v[5]
    for i in range(N):
        for c in range(T): o[c]*=x[c]*sigmoid(x[c])
@J
def k_gate(N,R,v,out):
    skip, bias, drive, g, gate = v[0], v[1], v[2], v[3], v[4]
    dx=v[5]
    for i in range(N):
        j=i%32
        for c in range(T):
            open_ = sigmoid(gate[c])
            dx[c] = g[c] * out[j, c] * open_ * (ONE + gate[c] * (ONE - open_))
            g[c] *= gate[c] * open_
@J
def k_zero(N,R,v,out):
    for i in range(N): out[i%32]=Z
for f in (k_read,k_write,k_step,k_slope,k_silu,k_gate,k_zero):
    f(N,R,v.copy(),out.copy()); ts=[]
    for _ in range(50):
        a,b=v.copy(),out.copy(); t=time.perf_counter(); f(N,R,a,b); ts.append(time.perf_counter()-t)
    print(f.py_func.__name__,'%.1f ns'%(min(ts)/N*1e9))
