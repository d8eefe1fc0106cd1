"""Write the best constants into the code: python apply_best.py CODE best_*.json"""
import json, re, sys
for file in sys.argv[2:]:
    for module, constants in json.load(open(file)).items():
        path = f"{sys.argv[1]}/mtr_lab/ops/gpu/{module}.py"
        text = open(path).read()
        for name, value in constants.items():
            text, n = re.subn(rf"^{re.escape(name)} = [^#\n]*?(?=( *  #.*)?$)", f"{name} = {value}", text, count=1, flags=re.M)
            print(path, name, value, n)
        open(path, "w").write(text)
