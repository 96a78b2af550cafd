//! JSON objects read strictly: as the pairs that the text holds, in order and with repeated keys, or as a struct.
//!
//! A map type keeps the last of two equal keys and says nothing; the text of a header that names a tensor twice is
//! wrong, and only this form can tell. The key `__metadata__`, which cannot name a tensor, is passed over.

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// The key of a safetensors header that is no tensor.
pub(crate) const METADATA: &str = "__metadata__";

/// Every pair of an object but `__metadata__`.
#[derive(Debug)]
pub(crate) struct Pairs<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Collect(PhantomData)).map(Self)
    }
}

struct Collect<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Collect<T> {
    type Value = Vec<(String, T)>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object keyed by tensor names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        // No capacity is taken from the input: the vector grows with what was really there.
        let mut pairs = Vec::new();
        while let Some(key) = object.next_key::<String>()? {
            if key == METADATA {
                object.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = object.next_value().map_err(|e| A::Error::custom(format!("tensor '{key}': {e}")))?;
            pairs.push((key, value));
        }
        Ok(pairs)
    }
}

/// A struct written as a JSON object: serde alone would take its fields from an array too, by their places.
#[derive(Debug)]
pub(crate) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

struct Fields<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(object))
    }
}
