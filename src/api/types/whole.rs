use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, Unexpected, Visitor},
};

/// From here on not every whole number is a double of its own: what was meant is not known.
const EXACT_DOUBLES: f64 = (1u64 << 53) as f64;

/// A whole number, however it is written: languages with one kind of number write `100.0`.
struct Whole(i64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl Visitor<'_> for Number {
            type Value = i64;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a whole number")
            }
            fn visit_i64<E>(self, value: i64) -> Result<i64, E> {
                Ok(value)
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<i64, E> {
                value.try_into().map_err(|_| E::custom(format_args!("{value} is too large")))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<i64, E> {
                if value.fract() != 0.0 {
                    return Err(E::invalid_type(Unexpected::Float(value), &self));
                }
                if value.abs() >= EXACT_DOUBLES {
                    return Err(E::custom(format_args!(
                        "{value} is too large, or too large to be written with a decimal point"
                    )));
                }
                Ok(value as i64)
            }
        }
        deserializer.deserialize_any(Number).map(Self)
    }
}

/// Reads a field that may be a whole number.
pub(crate) fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    Ok(Option::<Whole>::deserialize(deserializer)?.map(|whole| whole.0))
}

/// Reads a field that may be a list of whole numbers.
pub(crate) fn wholes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<i64>>, D::Error> {
    let list = Option::<Vec<Whole>>::deserialize(deserializer)?;
    Ok(list.map(|list| list.into_iter().map(|whole| whole.0).collect()))
}

#[cfg(test)]
mod tests {
    use crate::api::{extract::parse_json, types::CompletionRequest};

    #[test]
    fn a_whole_number_may_be_written_as_a_fraction_of_nothing() {
        let body = br#"{"max_tokens": 100.0, "top_k": 4e1, "seed": -2.0, "n": 1, "stop_token_ids": [2.0, 3],
            "best_of": null}"#;
        let mut request: CompletionRequest = parse_json(body).unwrap();
        assert_eq!((request.max_tokens, request.best_of, request.logprobs), (Some(100), None, None));
        let fields = request.take_sampling();
        assert_eq!((fields.top_k, fields.seed, fields.n, fields.min_tokens), (Some(40), Some(-2), Some(1), None));
        assert_eq!(fields.stop_token_ids, Some(vec![2, 3]));
    }

    #[test]
    fn what_is_no_whole_number_or_not_for_certain_is_refused_by_name() {
        for (body, param, why) in [
            (r#"{"n": 1.5}"#, "n", "a whole number"),
            (r#"{"max_tokens": "100"}"#, "max_tokens", "a whole number"),
            (r#"{"seed": 9007199254740992.0}"#, "seed", "decimal point"),
            (r#"{"seed": 9223372036854775808}"#, "seed", "too large"),
            (r#"{"stop_token_ids": [1, 2.5]}"#, "stop_token_ids[1]", "a whole number"),
        ] {
            let refused = parse_json::<CompletionRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(refused.param(), Some(param), "{body}: {refused:?}");
            assert!(refused.to_json().contains(why), "{body}: {refused:?}");
        }
    }
}
