import sys, torch
sys.argv = sys.argv[:1]
exec(open("try.py").read().split('if __name__')[0])
print(one(2,1,37,24,16,torch.float16,(0,1),True,"repeats",True,False,.5), one(2,2,19,20,4,torch.float32,(1,0),False,"scale",True,True), one(2,1,197,16,16,torch.float16,(0,1),False,None,True,False))
exec(open("try2.py").read().split('if __name__')[0])
print(run(1,37,300,16,24,torch.float16,(0,1),"unmerged",("delta","write"),200), run(2,17,40,8,12,torch.bfloat16,(1,0),"scale",("delta",)))
from mtr_lab.ops.gpu import mixer_read, decision, neighbours
n=lambda *s: torch.randn(*s,device="cuda")
w=ops.MambaWeights(*(t.half() for t in (n(2,40,1,4),n(2,40),n(2,56,40),n(2,40,24),n(2,40),n(2,40,16),n(2,40))))
x=n(2,33,40).half(); print(mixer_read.mamba_inner_read(x,x[:,:1].contiguous(),torch.tensor([[0],[16]],device="cuda"),ops.pack(w,torch.float16),torch.ones(2,2,33,device="cuda"),None,torch.ones(2,33,device="cuda"),torch.arange(33,device="cuda")[None].repeat(2,1),torch.zeros(2,40,dtype=torch.int64,device="cuda"),.5).norm())
h,r=n(2,65,96).half(),n(2,65,96); size,index,special=torch.ones(2,65,device="cuda"),torch.arange(65,device="cuda")[None].repeat(2,1),torch.full((2,1),32,device="cuda")
print(decision.asymmetric_plan(ops.DecisionInputs(torch.rand(2,2,65,device="cuda"),2.,index,size,special,h,r,5,29,False))[0].sum())
print(neighbours.neighbour_plan(ops.NeighbourInputs(index,size,special,size,h,r,5,False,(8,8)))[0].sum())
torch.cuda.synchronize()
