import sys, torch, time
sys.path.insert(0,"tests/ops/gpu"); sys.path.insert(0,"tests/ops")
from mtr_lab.ops.gpu import scan_together as st, scan
scan.fits_together=lambda *a: True
from mtr_lab.ops.scan_inputs import ScanInputs
from mtr_lab.ops.scan_reference import selective_scan_reference
import torch.nn.functional as F
dev="cuda" if torch.cuda.is_available() else "cpu"
def one(G,B,L,E,N,dtype,reverse,gap,factor,gate,soft,scale=1.0):
    g=torch.Generator().manual_seed(L)
    n=lambda *s: torch.randn(*s,generator=g)
    u,delta=n(G,B,L,E).to(dtype),n(G,B,L,E).to(dtype)
    A=-torch.exp(n(G,E,N)); bcx=n(G,B,L,2*N+3)
    D,z,bias=n(G,E),n(B,L,2*E).to(dtype)[...,E:] if gate else None,n(G,E)
    gp=torch.randint(0,4,(B,G,L),generator=g) if gap else None
    if gap: gp[...,0]=0
    ds=1+n(B,L).abs() if factor=="scale" else None
    rp=(torch.arange(float(B*L)).view(B,L)%5+1) if factor=="repeats" else None
    if not soft: delta=F.softplus(delta.float()+bias[:,None,None]).to(dtype)
    mv=lambda t: None if t is None else t.to(dev)
    y=scan.scan(mv(u),mv(delta),mv(A.transpose(1,2).contiguous()),mv(bcx)[...,3:],mv(D),mv(z),mv(bias),None,mv(gp),mv(ds),reverse,(),softplus=soft,scale=scale,repeats=mv(rp))[0].cpu()
    d=lambda t: t if t is None or not t.is_floating_point() else t.double()
    if soft: dl,bb=delta.double(),bias.double()
    else:
        dl=delta.double(); dl=dl+torch.log(-torch.expm1(-dl))-bias.double()[:,None,None]; bb=bias.double()
    ex,_=selective_scan_reference(ScanInputs(u.double(),dl,A.double(),bcx[...,3:3+N].double(),bcx[...,3+N:].double(),D.double(),d(z),bb,None,gp,d(ds),d(rp),reverse),())
    ex=ex*scale
    return ((y.double()-ex).norm()/ex.norm()).item()
if __name__=="__main__":
    for args in [(2,1,7,20,16,torch.float32,(0,1),False,None,True,True),(2,2,19,35,4,torch.float32,(1,0),True,"scale",True,True),(2,1,37,16,16,torch.float16,(0,1),True,"repeats",True,False,.5),(1,1,1,8,2,torch.float32,(1,),False,None,False,True),(3,3,40,12,16,torch.bfloat16,(0,1,1),False,None,True,True)]:
        for keep in (8,2):
            st.UNROLL=keep
            t=time.time(); print(args, keep, one(*args), time.time()-t)
