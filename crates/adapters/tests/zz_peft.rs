mod common;
use common::*;
use rankfold_adapters::*;
#[test]
fn write_for_peft() {
    let b = reference();
    let t = std::path::Path::new("/tmp/peft_out");
    for (name, targets, rslora, excl) in [
        ("all", Targets::AllLinear, true, Some(Names::Pattern(r".*layers\.1\.mlp\.up_proj".into()))),
        ("default", Targets::Default, false, None),
        ("regex", Targets::parse(r".*\.(q|o)_proj|lm_head"), false, None),
    ] {
        let (mut layers, arch) = golden_layers(b.as_ref());
        let config = AdapterConfig {
            spec: LoraSpec { rank: 4, alpha: 10.0, rslora, dropout: 0.1 },
            targets,
            init: Init::Random,
            exclude: excl,
            rank_pattern: vec![("layers.0.*q_proj".into(), 3), ("q_proj".into(), 6)],
            alpha_pattern: vec![("q_proj".into(), 2.5)],
            ..Default::default()
        };
        let attached = attach_new(b.as_ref(), &mut all(&mut layers), &config, &arch, 5).unwrap();
        println!("{:?}", attached.unused);
        write_folder(b.as_ref(), &t.join(name), &attached.config, &layers).unwrap();
        // the merged matrices, for PEFT's own merge to be compared with
        let mut specs = vec![];
        for l in layers.iter_mut() {
            l.merge(b.as_ref()).unwrap();
            specs.push(rankfold_files::Spec::new(
                format!("{}.weight", l.path()),
                rankfold_backend::DType::F32,
                [l.outputs(), l.inputs()],
            ));
        }
        let mut w = rankfold_files::Writer::create(&t.join(name).join("merged.safetensors"), specs).unwrap();
        for l in &layers {
            let rankfold_autograd::Base::Dense(m) = l.base() else { panic!() };
            w.write_view(&format!("{}.weight", l.path()), b.as_ref(), m.view()).unwrap();
        }
        w.finish().unwrap();
    }
}
