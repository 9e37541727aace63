//! `choice!`: an enum whose values have names in a configuration.
//!
//! The one list of a key's allowed values: the enum, its names, reading and writing all come from
//! it, so a new value is one line.

macro_rules! choice {
    ($(#[$about:meta])* pub enum $name:ident {
        $($(#[$about_value:meta])* $value:ident = $text:literal,)+
    }) => {
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name {
            $($(#[$about_value])* $value,)+
        }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$value),+];

            /// Every value as it is written in a configuration.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            pub fn name(self) -> &'static str {
                match self {
                    $($name::$value => $text,)+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl std::str::FromStr for $name {
            type Err = crate::Error;

            fn from_str(given: &str) -> Result<Self, crate::Error> {
                match given {
                    $($text => Ok($name::$value),)+
                    _ => Err(crate::Error::Usage {
                        what: format!("`{given}` is not known here"),
                        remedy: crate::config::nearest::one_of(given, $name::NAMES),
                    }),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
                out.serialize_str(self.name())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            /// The error is the remedy: which values there are.
            fn deserialize<D: serde::Deserializer<'de>>(inp: D) -> Result<Self, D::Error> {
                let given = String::deserialize(inp)?;
                given.parse().map_err(|_| {
                    serde::de::Error::custom(crate::config::nearest::one_of(&given, $name::NAMES))
                })
            }
        }
    };
}

pub(crate) use choice;
