import ctypes, os, sys, time, json
opts = dict(a.split("=") for a in sys.argv[1:])
if "spin" in opts:
    os.environ["GOMP_SPINCOUNT"] = opts["spin"]; os.environ["OMP_WAIT_POLICY"] = ""; del os.environ["OMP_WAIT_POLICY"]
if opts.get("pool") == "one":
    ctypes.CDLL("libgomp.so.1.0.0")
import torch
threads=int(opts.get("threads",2))
if "spin" in opts:
    pass
else:
    os.environ.setdefault("OMP_WAIT_POLICY","PASSIVE")
import mtr_lab, timm
from mtr_lab.ops.cpu import threads as th, mixer, norm, decision
import numba
torch.set_num_threads(threads)
if opts.get("share")=="0":
    whole=th.run
    mixer.run=norm.run=decision.run=lambda kernel,*a,share=None: whole(kernel,*a)
if opts.get("numba")=="1":
    def run(kernel,*a,share=None):
        numba.set_num_threads(1); kernel(*a)
    mixer.run=norm.run=decision.run=run
torch.manual_seed(0)
models={"vim":mtr_lab.create_model("vim_ti").eval(),"deit":timm.create_model("deit_tiny_patch16_224").eval()}
for p in ("mtr","fovea"):
    models[p]=mtr_lab.create_model("vim_ti").eval(); mtr_lab.patch(models[p],p,ratio=0.4)
n1,n8=(2,1) if opts.get("warm") else (60,12)
with torch.inference_mode():
    for b,n in ((1,n1),(8,n8)):
        x=torch.randn(b,3,224,224); T={k:[] for k in models}; C={k:[] for k in models}
        for i in range(n+2):
            for k,m in models.items():
                a=time.perf_counter(); c=time.process_time(); m(x); t=time.perf_counter()-a; c=time.process_time()-c
                if i>1: T[k].append(t*1e3); C[k].append(c*1e3)
        if len(T["vim"])>1:
            s={k:(round(min(v),1),round(sorted(v)[len(v)//2],1),round(sorted(C[k])[len(v)//2],1)) for k,v in T.items()}
            q=lambda i:{"mtr":round(s["vim"][i]/s["mtr"][i],3),"fovea":round(s["vim"][i]/s["fovea"][i],3),"vim/deit":round(s["vim"][i]/s["deit"][i],3),"fov/deit":round(s["fovea"][i]/s["deit"][i],3)}
            print(opts,"batch",b,"wall min,median,cpu",s,"min",q(0),"median",q(1),flush=True)
