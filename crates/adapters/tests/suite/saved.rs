//! What is trained beside the updates: biases and whole modules, in a folder and back.

use crate::common::{all, reference};
use rankfold_adapters::{
    AdapterConfig, AdapterFolder, Bias, Linear, LoraSpec, Names, Purpose, Targets, Weight, attach_folder, attach_new,
    train_modules, write_folder,
};
use rankfold_autograd::{Base, Parameter, Tensor, Value};
use rankfold_backend::Backend;

/// "a.q" and "a.k", each with a bias, and "a.o" without.
fn model(backend: &dyn Backend, first: f32) -> Vec<Linear> {
    let tensor =
        |values: &[f32], dims: &[usize]| Tensor::constant(backend.upload(values).unwrap(), dims.to_vec()).unwrap();
    let layer = |(path, index): (&str, u64)| {
        let base = Base::Dense(tensor(&[0.5; 6], &[3, 2]));
        let bias = (path != "a.o").then(|| Value::Frozen(tensor(&[first, 2.0, 3.0], &[3])));
        Linear::new(path, index, Weight::Frozen(base), bias).unwrap()
    };
    ["a.q", "a.k", "a.o"].into_iter().zip(0..).map(layer).collect()
}

fn config(bias: Bias) -> AdapterConfig {
    let targets = Targets::Named(Names::List(["q".to_owned(), "o".to_owned()].into()));
    AdapterConfig { spec: LoraSpec::new(1, 1.0), targets, bias, ..AdapterConfig::default() }
}

fn names(layers: &[Linear]) -> Vec<String> {
    layers.iter().flat_map(Linear::parameters).map(|(name, _)| name).filter(|name| !name.contains("lora")).collect()
}

#[test]
fn biases_are_trained_where_peft_trains_them_under_its_names_and_come_back() {
    let b = reference();
    let [q, k] = ["base_model.model.a.q.base_layer.bias", "base_model.model.a.k.bias"];
    for (bias, expected) in [(Bias::None, vec![]), (Bias::All, vec![q, k]), (Bias::LoraOnly, vec![q])] {
        let (mut layers, mut others) = (model(b.as_ref(), 1.0), model(b.as_ref(), 7.0));
        let attached = attach_new(b.as_ref(), &mut all(&mut layers), &config(bias), "llama", 0).unwrap();
        assert_eq!(names(&layers), expected);
        let folder = tempfile::tempdir().unwrap();
        write_folder(b.as_ref(), folder.path(), &attached.config, &layers, Vec::new(), Purpose::Exchange).unwrap();
        let opened = AdapterFolder::open(folder.path()).unwrap();
        assert_eq!(opened.config().bias, bias);
        attach_folder(b.as_ref(), &mut all(&mut others), &opened, "llama").unwrap();
        assert_eq!(names(&others), expected);
        let first = |layer: &Linear| b.download::<f32>(layer.bias().unwrap().tensor().view()).unwrap()[0];
        for (layer, other) in layers[..2].iter().zip(&others) {
            let trained = matches!(layer.bias(), Some(Value::Trained(_)));
            assert_eq!(first(other), if trained { 1.0 } else { 7.0 }, "{}", layer.path());
        }
        if bias != Bias::All {
            continue;
        }
        // A folder without them, or with some that its configuration does not explain, is another folder.
        let opened = |text: &str| {
            std::fs::write(folder.path().join("adapter_config.json"), text).unwrap();
            let opened = AdapterFolder::open(folder.path()).unwrap();
            attach_folder(b.as_ref(), &mut all(&mut model(b.as_ref(), 7.0)), &opened, "llama").unwrap_err().to_string()
        };
        let none = AdapterConfig { bias: Bias::None, ..attached.config.clone() };
        assert!(opened(&none.to_json()).contains("bias' belongs to no layer"));
        let without = model(b.as_ref(), 1.0);
        let mut without: Vec<Linear> = without.into_iter().collect();
        attach_new(b.as_ref(), &mut all(&mut without), &none, "llama", 0).unwrap();
        write_folder(b.as_ref(), folder.path(), &none, &without, Vec::new(), Purpose::Exchange).unwrap();
        assert!(opened(&attached.config.to_json()).contains(&format!("no tensor '{q}'")));
    }
}

#[test]
fn modules_are_trained_whole_in_f32_and_come_back_and_unknown_ones_are_named() {
    let b = reference();
    let value = |first: f32| Value::Frozen(Tensor::constant(b.upload(&[first, 2.0]).unwrap(), [2, 1]).unwrap());
    let config = |names: &[&str]| AdapterConfig {
        modules_to_save: names.iter().map(|name| name.to_string()).collect(),
        ..config(Bias::None)
    };
    let train = |values: &mut [Value; 2], names: &[&str], folder| {
        let [norm, head] = values;
        let modules = vec![("a.norm".to_owned(), norm), ("lm_head".to_owned(), head)];
        train_modules(b.as_ref(), modules, &config(names), folder)
    };
    let mut values = [value(1.0), value(2.0)];
    let message = train(&mut values, &["lm_head", "tail"], None).unwrap_err().to_string();
    assert_eq!(message, "'modules_to_save' has 'tail', expected one of lm_head, norm");
    assert!(values.iter().all(|value| value.parameter().is_none()));
    train(&mut values, &["lm_head"], None).unwrap();
    assert!(values[0].parameter().is_none());
    let head: Parameter = values[1].parameter().unwrap().clone();

    let (folder, mut layers) = (tempfile::tempdir().unwrap(), model(b.as_ref(), 1.0));
    let attached = attach_new(b.as_ref(), &mut all(&mut layers), &config(&["lm_head"]), "llama", 0).unwrap();
    let modules = vec![("base_model.model.lm_head.weight".to_owned(), head)];
    write_folder(b.as_ref(), folder.path(), &attached.config, &layers, modules, Purpose::Exchange).unwrap();
    let opened = AdapterFolder::open(folder.path()).unwrap();
    attach_folder(b.as_ref(), &mut all(&mut model(b.as_ref(), 1.0)), &opened, "llama").unwrap();
    let mut others = [value(5.0), value(6.0)];
    train(&mut others, &["lm_head"], Some(&opened)).unwrap();
    assert_eq!(b.download::<f32>(others[1].tensor().view()).unwrap(), [2.0, 2.0]);
    let message = train(&mut others, &["norm"], Some(&opened)).unwrap_err().to_string();
    assert!(message.contains("no tensor 'base_model.model.a.norm.weight'"), "{message}");
}

/// What PEFT 0.21.2 saved of a model of these modules for each entry.
#[test]
fn an_entry_means_every_module_whose_path_ends_in_it_as_with_peft() {
    let norms = ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"].map(|n| format!("model.{n}"));
    let [embedding, head] = ["model.embed_tokens", "lm_head"].map(str::to_owned);
    let all: Vec<String> = [&embedding].into_iter().chain(&norms).chain([&head]).cloned().collect();
    for (names, expected) in [
        (vec!["norm"], norms.to_vec()),
        (vec!["layernorm"], norms[..2].to_vec()),
        (vec!["model.norm"], norms[2..].to_vec()),
        (vec!["head"], vec![head]),
        (vec!["tokens", "norm"], [&[embedding], &norms[..]].concat()),
    ] {
        let modules_to_save = names.iter().map(|name| name.to_string()).collect();
        let config = AdapterConfig { modules_to_save, ..config(Bias::None) };
        let saved: Vec<String> = all.iter().filter(|path| config.saves(path)).cloned().collect();
        assert_eq!(saved, expected, "{names:?}");
    }
}
