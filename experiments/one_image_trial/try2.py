import torch, time
from mtr_lab import ops
from mtr_lab.ops.gpu import project, project_few as pf
dev="cuda" if torch.cuda.is_available() else "cpu"
g=torch.Generator().manual_seed(0)
n=lambda *s: torch.randn(*s,generator=g)
def run(B,L,E,N,R,dtype,rev,part,stats,sms=1):
    G=len(rev)
    w=ops.MambaWeights(n(G,E,1,4),n(G,E),n(G,R+2*N,E)*E**-.5,n(G,E,R)*R**-.5,n(G,E),n(G,E,N),n(G,E))
    w=ops.MambaWeights(*(t.to(dtype).to(dev) for t in w)); p=ops.pack(w,dtype)
    x=n(B,L,2*E).to(dtype).to(dev)[...,:E]
    src=torch.arange(L).repeat_interleave(2)[None].repeat(B,1); src[:,5::7]=-1
    o={"plain":{},"scale":dict(delta_scale=1+torch.rand(B,L)),"repeats":dict(repeats=torch.randint(1,4,(B,L)).float()),"unmerged":dict(index=torch.arange(0,2*L,2)[None].repeat(B,1),source=src)}[part]
    o={k:v.to(dev) for k,v in o.items()}
    ds=o.pop("delta_scale",None)
    pf.num_sms=lambda d: sms
    pf.MAX_TOKENS=10**9; new=project.project(x,p,ds,rev,stats,**o)
    pf.MAX_TOKENS=-1; old=project.project(x,p,ds,rev,stats,**o)
    return [((a.double()-b.double()).norm()/b.double().norm().clamp(min=1e-9)).item() for a,b in zip(new,old)]
if __name__=="__main__":
    for a in [(2,7,70,3,5,torch.float32,(0,1),"plain",()),(1,37,300,16,24,torch.float16,(0,1),"unmerged",("delta","write"),200),(3,18,40,8,12,torch.bfloat16,(1,0,0),"scale",("delta",)),(2,33,600,16,24,torch.float16,(0,1),"repeats",("delta","write"),100),(1,1,20,4,4,torch.float16,(0,),"plain",())]:
        print(a,["%.1e"%v for v in run(*a)],flush=True)
