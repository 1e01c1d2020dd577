import sys,time; sys.path.insert(0,'.')
import torch
from lora.model import Llama,LlamaConfig,Llama3Rope,packed
from lora.generate import generate
d=torch.device('cuda')
print(torch.__version__, torch.cuda.get_device_name())
c=LlamaConfig(128256,2048,8192,16,32,8,64,1e-5,5e5,Llama3Rope(32,1,4,8192),True)
def make(dt,quant=None,c=c):
    torch.manual_seed(0)
    with d: m=Llama(c,dt)
    for n,p in m.named_parameters(): p.data=p.data.to(dt).normal_(1 if 'norm' in n else 0,.02)
    if quant:
        from lora.quant import NF4Linear
        for b in m.model.layers:
            for part in (b.self_attn,b.mlp):
                for n,l in list(part.named_children()): setattr(part,n,NF4Linear.quantise(l.weight.data))
    return m
# correctness in fp32 on a small shape, no TF32
s=LlamaConfig(4096,256,512,4,8,2,32,1e-5,5e5,None,True)
m=make(torch.float32,c=s)
for p in m.parameters(): p.data.mul_(5) if p.dim()>1 else None
g=torch.Generator().manual_seed(1)
prompts=[torch.randint(0,4096,(int(n),),generator=g).tolist() for n in torch.randint(1,60,(13,),generator=g)]
for kw in ({},{'temperature':1.},{'temperature':1.,'top_p':.9}):
    a=generate(m,prompts,list(range(200)),40,**kw); b=generate(m,prompts,list(range(200)),40,batch_size=1,**kw)
    print(kw,'batched == alone:',a==b,[len(x.ids) for x in a])
bad=0
for p,x in zip(prompts,generate(m,prompts,[],20)):
    row=list(p)
    for t in x.ids:
        with torch.no_grad(): z=m(torch.tensor(row,device=d),torch.arange(len(row),device=d),packed([len(row)]))[-1]@m.head.t()
        bad+=int(z.argmax())!=t; row.append(t)
print('tokens that differ from recomputing:',bad)
for quant in (None,'nf4'):
    try: m=make(torch.bfloat16,quant)
    except Exception as e: print(quant,type(e).__name__,e); continue
    for B in (32,1):
        P=[torch.randint(0,128256,(64,),generator=g).tolist() for _ in range(B)]
        generate(m,P,[],8,batch_size=B)
        for kw in ({},{'temperature':1.,'top_p':.9}):
            torch.cuda.synchronize(); t=time.time(); generate(m,P,[],128,batch_size=B,**kw); torch.cuda.synchronize(); t=time.time()-t
            print(quant or 'bf16','batch',B,kw,f'{B*128/t:.0f} tok/s {t/128*1e3:.1f} ms a token; peak {torch.cuda.max_memory_allocated()/2**30:.1f} GiB')
    del m
