//! Responses and what they carry.

use std::convert::Infallible;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::Value;

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

pub(super) fn text_response(kind: &'static str, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(text.into()).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

pub(super) fn json_response(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = text_response("application/json", value.to_string());
    *response.status_mut() = status;
    response
}
