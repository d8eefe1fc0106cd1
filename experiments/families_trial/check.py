import os, sys, torch, torch.nn.functional as F
from mtr_lab.ops.gpu import conv_grid, scan_tiles, scan_by_step
from mtr_lab.ops.scan_reference import selective_scan_reference
from mtr_lab.ops.scan_inputs import ScanInputs
dev='cuda' if torch.cuda.is_available() else 'cpu'
torch.manual_seed(0)
def rel(a,b): return ((a.double()-b).norm()/b.norm()).item()
def R(*s): return torch.randn(*s, device=dev)
def conv(B,E,H,W,k,dtype=torch.float32):
    x,w,b=R(B,H*W,2*E).to(dtype)[...,:E].transpose(1,2).unflatten(2,(H,W)),R(E,1,k,k).to(dtype),R(E).to(dtype)
    y=conv_grid.convolve(x,w,b,silu=True)
    ref=F.silu(F.conv2d(x.double(),w.double(),b.double(),padding=k//2,groups=E))
    print('conv',rel(y,ref), rel(conv_grid.convolve(x,w,None,silu=False),F.conv2d(x.double(),w.double(),None,padding=k//2,groups=E)))
def tiles(B,L,E,N,Rk,G,dtype=torch.float32,stats=('delta','output'),gap=True,factor='repeats'):
    u,low,W,a,d,bias=R(B,L,E).to(dtype),R(G,B,L,Rk+2*N).to(dtype),(R(G,E,Rk)*Rk**-.5).to(dtype),-R(G,E,N).exp(),R(G,E),R(G,E)-2
    order=torch.stack([torch.randperm(L,device=dev) for _ in range(G)])[:,None].expand(-1,B,-1)
    gp=torch.randint(0,3,(B,G,L),device=dev).float() if gap else None
    f=torch.randint(1,4,(B,L),device=dev).float() if factor else None
    y,s=scan_tiles.scan(u,low,W,a,d,bias,order,gp,f,repeats=factor=='repeats',stats=stats)
    D=lambda t:None if t is None else t.double()
    delta=torch.einsum('gblr,ger->gble',low[...,:Rk].double(),W.double())
    inp=ScanInputs(D(u).expand(G,-1,-1,-1),delta,D(a),D(low[...,Rk:Rk+N]),D(low[...,Rk+N:]),D(d),None,D(bias),order.contiguous(),D(gp),D(f) if factor=='scale' else None,D(f) if factor=='repeats' else None,(0,)*G)
    ry,rs=selective_scan_reference(inp,stats)
    print('tiles',rel(y,ry),rel(s,rs) if stats else '')
def steps(B,L,E,N,G,dtype=torch.float32,stats=('delta','output'),gate=True):
    u,delta,z=(R(B,L,E).to(dtype) for _ in range(3))
    a,d,bias=-R(N,E).exp(),R(E),R(E)-2
    b,c=R(B,L,4,N).to(dtype),R(B,L,N).to(dtype)
    order=torch.stack([torch.randperm(L,device=dev) for _ in range(G)])
    y,s=scan_by_step.scan(u,delta,a,b,c,d,bias,order,z if gate else None,stats)
    Y=0; S=[]
    for g in range(G):
        inv=torch.empty_like(order[g]); inv[order[g]]=torch.arange(L,device=dev)
        D=lambda t:t.double()[None]
        inp=ScanInputs(D(u),D(delta[:,inv]),D(a.T),D(b[:,inv,g]),D(c[:,inv]),D(d),None,D(bias),order[g].expand(1,B,L).contiguous(),None,None,None,(0,))
        ry,rs=selective_scan_reference(inp,stats); Y=Y+ry; S.append(rs)
    if gate: Y=Y*F.silu(z.double())
    print('steps',rel(y,Y),rel(s,torch.cat(S)) if stats else '')
if __name__=='__main__':
    what=sys.argv[1:]
    if not what or 'conv' in what: conv(2,20,3,5,3); conv(1,70,4,6,7)
    if not what or 'tiles' in what:
        scan_tiles.TOKENS=8
        tiles(2,21,20,1,3,4); tiles(1,16,40,2,5,2,factor='scale',gap=False,stats=()); tiles(1,9,33,1,6,1,factor=None,gap=False,stats=('write',))
    if not what or 'steps' in what: steps(2,9,20,2,4); steps(1,8,32,16,3,stats=(),gate=False); steps(1,5,32,1,1)
