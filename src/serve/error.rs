//! Errors as OpenAI's API words them.

use hyper::header::{ALLOW, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::response::{Body, json_response};

/// A refusal: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// The methods that a path takes, where the request's is none of them.
    allow: Option<&'static str>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, allow: None }
    }

    pub(super) fn method(path: &str, method: &hyper::Method, allow: &'static str) -> ApiError {
        let message = format!("{path} takes {allow}, not {method}");
        ApiError { allow: Some(allow), ..ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message) }
    }

    pub(super) fn bad(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// A bad value of a field.
    pub(super) fn field(name: &str, message: impl std::fmt::Display) -> ApiError {
        ApiError { param: Some(name.to_string()), ..ApiError::bad(format!("{name}: {message}")) }
    }

    pub(super) fn no_model(name: &str) -> ApiError {
        let message = format!("the model {name:?} does not exist; GET /v1/models lists those that do");
        ApiError::new(StatusCode::NOT_FOUND, message).param("model").code("model_not_found")
    }

    pub(super) fn stopping() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping")
    }

    pub(super) fn param(self, name: &str) -> ApiError {
        ApiError { param: Some(name.to_string()), ..self }
    }

    pub(super) fn code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    pub(super) fn json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }

    pub(super) fn response(&self) -> Response<Body> {
        let mut response = json_response(self.status, &self.json());
        let header = match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some((RETRY_AFTER, "1")),
            StatusCode::UNAUTHORIZED => Some((WWW_AUTHENTICATE, "Bearer")),
            _ => self.allow.map(|allow| (ALLOW, allow)),
        };
        if let Some((name, value)) = header {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}
